"""One dispatch over the formats of a draft's weights, cast, quantized or cut down to some neurons, and their bytes."""

import copy
import functools
import importlib.util
import math

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from ..model import projections
from ..model.accelerate_hooks import streaming_hook
from ..model.adapters import combined
from ..model.projections import device_of, is_opaque, projection_bias, projection_shape
from ..model.sites import MlpSite, neuron_weight
from ..settings.config import SiriusConfig
from . import bnb, packed, shortlist
from .gather import OWN_MEMORY, Selection, empty, padded
from .linear import DraftLinear, plain_linear


# The dtype in which weights are gathered before they are quantized.
GATHERED_AS = {"int8": torch.float16, "int4": torch.bfloat16, "nf4": torch.bfloat16}
_PRODUCT = 2**24  # numbers that are dequantized at a time
_TOLERANCE = 0.3  # of a layer's product, relative in norm


def draft_linear(
    projection: nn.Module,
    draft_dtype: str | None,
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    memory: torch.Tensor | None = None,
) -> DraftLinear:
    """Returns a projection with some of its rows or columns, cast or quantized.

    Args:
        projection: an `nn.Linear`, a `Conv1D`, or a quantized linear layer of some library; with adapters it is what
            they make of it.
        draft_dtype: of `SiriusConfig`; `None` keeps the projection's own format, if it is plain or bitsandbytes', and
            dequantizes others.
        rows: long [num_rows], the outputs to keep, all by default.
        columns: long [num_columns], the inputs to keep, all by default.
        compute_dtype: the model's dtype, in which 4-bit layers compute; by default that of the weight.
        memory: uint8 [num_bytes], where a weight that is not quantized goes, if it fits and is to be on this device; by
            default new memory.
    """
    projection = combined(projection)
    bias = projection_bias(projection)
    if bias is not None:
        bias = bias.detach() if rows is None else bias.detach().index_select(0, rows.to(bias.device))
    if bnb.is_8bit(projection) and draft_dtype in (None, "int8"):
        weight, scales = bnb.int8_state(projection)
        scales = scales if rows is None else scales.index_select(0, rows.to(scales.device))
        source = Selection(weight, rows, columns)
        values = bnb.int8_values(source)
        for place, piece in source.pieces():
            values[place, : piece.shape[1]] = piece
        return bnb.int8_linear(values, scales, bias, projection.state.threshold)
    quantized_as = draft_dtype
    if draft_dtype is None and bnb.is_4bit(projection):
        quantized_as = projection.weight.quant_state.quant_type
    weight = dense_weight(projection)
    source = Selection(weight, rows, columns)
    if quantized_as in (None, "bfloat16", "float16"):
        dtype = getattr(torch, quantized_as) if quantized_as else weight.dtype
        linear = plain_linear(source.copy(dtype, memory), bias if bias is None else bias.to(dtype))
        return DraftLinear(linear, [dtype], linear.out_features)
    if quantized_as == "int4":
        return packed.int4_linear(source, bias)
    if quantized_as == "int8":
        return packed.int8_linear(source, bias) if weight.device.type == "cpu" else bnb.quantized_to_8bit(source, bias)
    if compute_dtype is None or not compute_dtype.is_floating_point:
        compute_dtype = weight.dtype
    if compute_dtype == torch.float64:
        compute_dtype = torch.float32
    return bnb.quantized_to_4bit(source, bias, quantized_as, compute_dtype)


def changes(projection: nn.Module, draft_dtype: str | None) -> bool:
    """Whether a draft of this dtype has another weight than the projection itself."""
    if draft_dtype is None:
        return False
    if bnb.is_4bit(projection):
        return draft_dtype != projection.weight.quant_state.quant_type
    return is_opaque(projection) or str(projection.weight.dtype) != f"torch.{draft_dtype}"


def num_bytes(
    projection: nn.Module, draft_dtype: str | None, num_rows: int | None = None, num_columns: int | None = None
) -> int:
    """Returns the bytes of a `draft_linear` with so many rows and columns, all by default; of a head with a shortlist
    those that are its own.
    """
    if draft_dtype == shortlist.SHORTLIST:
        return shortlist.num_bytes(projection)
    out_features, in_features = projection_shape(projection)
    out_features = out_features if num_rows is None else num_rows
    in_features = in_features if num_columns is None else num_columns
    bias = projection_bias(projection)
    has_bias = bias is not None
    bias_itemsize = 0 if bias is None else min(bias.itemsize, torch.float32.itemsize)
    if draft_dtype is None:
        draft_dtype = "int8" if bnb.is_8bit(projection) else "nf4" if bnb.is_4bit(projection) else None
    device = device_of(projection)
    if draft_dtype == "int4":
        return packed.int4_bytes(out_features, in_features, has_bias, device)
    if draft_dtype == "int8" and device.type == "cpu" and not bnb.is_8bit(projection):
        return packed.int8_bytes(out_features, in_features, has_bias)
    if draft_dtype == "int8":
        return out_features * (padded(in_features, bnb.INT8_COLUMNS) + 4 + has_bias * torch.float16.itemsize)
    if draft_dtype == "nf4":  # fp4 takes as much
        rows, columns = padded(out_features, bnb.NF4_ROWS), padded(in_features, bnb.NF4_BLOCK)
        return rows * columns // 2 + rows * columns // bnb.NF4_BLOCK * 4 + rows * bias_itemsize
    dtype = getattr(torch, draft_dtype) if draft_dtype else projections.compute_dtype(projection)
    return out_features * (in_features + has_bias) * dtype.itemsize


def narrowed(weight: torch.Tensor, draft_dtype: str | None) -> torch.Tensor:
    """Returns a weight in the dtype from which a draft of `draft_dtype` is gathered, if that takes less memory."""
    if draft_dtype is None:
        return weight
    dtype = GATHERED_AS.get(draft_dtype) or getattr(torch, draft_dtype)
    return weight if dtype.itemsize >= weight.itemsize else Selection(weight).copy(dtype)


def num_kept_neurons(density: float, num_neurons: int, draft_dtype: str | None) -> int:
    """Returns how many neurons of an MLP a gathered draft keeps: whole blocks where they are packed in blocks."""
    num_kept = max(1, round(density * num_neurons))
    return min(padded(num_kept, bnb.NF4_BLOCK), num_neurons) if draft_dtype == "nf4" else num_kept


def gather_neurons(
    site: MlpSite,
    part: nn.Module,
    loaded: nn.Module,
    neuron_indices: torch.Tensor,
    draft_dtype: str | None,
    memory: torch.Tensor | None = None,
) -> DraftLinear | None:
    """Returns the chosen neurons of a projection of an MLP; `None` where it is kept as it is.

    Args:
        site: the MLP.
        part: its gate, up or down projection.
        loaded: the same with its weights, where they are elsewhere (offloaded).
        neuron_indices: long [num_kept], ascending.
        draft_dtype, memory: as for [`draft_linear`].
    """
    if len(neuron_indices) == site.num_neurons and not changes(part, draft_dtype) and loaded is part:
        return None
    rows = columns = None
    if part is site.down:
        columns = neuron_indices
    else:
        num_fused = projection_shape(part)[0] // site.num_neurons
        rows = torch.cat([neuron_indices + i * site.num_neurons for i in range(num_fused)])
    return draft_linear(
        loaded, draft_dtype, rows, columns, compute_dtype=projections.compute_dtype(part), memory=memory
    )


def gathered_shapes(sites: list[MlpSite], config: SiriusConfig) -> dict[nn.Module, tuple[int, int]]:
    """Returns (out_features, in_features) of what is gathered of each projection that is not kept as it is."""
    shapes = {}
    for site in sites:
        num_kept = num_kept_neurons(config.density, site.num_neurons, config.draft_dtype)
        for part in site.parts:
            is_whole = num_kept == site.num_neurons and not changes(part, config.draft_dtype)
            if is_whole and streaming_hook(part) is None:
                continue
            out_features, in_features = projection_shape(part)
            num_rows = out_features // site.num_neurons * num_kept
            shapes[part] = (out_features, num_kept) if part is site.down else (num_rows, in_features)
    return shapes


def reusable_bytes(sites: list[MlpSite], config: SiriusConfig) -> dict[nn.Module, int]:
    """Returns how much memory is kept from call to call for the gathered neurons of each projection: of large ones on a
    CPU, where neither they nor the projection are quantized. (Elsewhere torch keeps what it allocates anyway, offloaded
    weights are gathered while they pass, and quantizing or dequantizing takes longer than new memory.)
    """
    if config.draft_dtype in GATHERED_AS:
        return {}
    sizes = {}
    for part, (num_rows, num_columns) in gathered_shapes(sites, config).items():
        if bnb.is_8bit(part) or bnb.is_4bit(part) or is_opaque(part):
            continue
        dtype = part.weight.dtype if config.draft_dtype is None else getattr(torch, config.draft_dtype)
        size = num_rows * num_columns * dtype.itemsize
        if part.weight.device.type == "cpu" and size >= OWN_MEMORY:
            sizes[part] = size
    return sizes


def runs(draft_dtype: str | None, device: torch.device) -> bool:
    """Whether a device can run a draft of this dtype."""
    try:
        check_draft_dtype(draft_dtype, device)
    except (ValueError, ImportError):
        return False
    return True


def head_dtype(draft_dtype: str | None, device: torch.device) -> str | None:
    """Returns the dtype of the head of a draft of `draft_dtype`: 4 bits cost a small model more tokens there than they
    save bytes, so that it is in 8 where the device runs them.
    """
    return "int8" if draft_dtype == "int4" and runs("int8", device) else draft_dtype


@functools.cache
def check_draft_dtype(draft_dtype: str | None, device: torch.device) -> None:
    """Raises `ImportError` where a package is missing, and `ValueError` where the device cannot run this dtype."""
    if draft_dtype is None:
        return
    needs_bnb = draft_dtype == "nf4" or (draft_dtype == "int8" and device.type != "cpu")
    if needs_bnb and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"draft_dtype={draft_dtype!r} needs bitsandbytes: pip install hf_sirius[bnb], or use 'bfloat16'"
        )
    try:
        projection = plain_linear(torch.ones(bnb.NF4_ROWS, bnb.NF4_BLOCK, device=device), None)
        with torch.no_grad():
            outputs = draft_linear(projection, draft_dtype)(torch.ones(1, bnb.NF4_BLOCK, device=device))
        if not torch.allclose(outputs, torch.full_like(outputs, bnb.NF4_BLOCK), rtol=0.05):
            raise ValueError(f"its product of ones is {outputs[0, 0].item():g}, and not {bnb.NF4_BLOCK}")
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        if should_reduce_batch_size(error):  # the device is full, which says nothing about the dtype
            raise
        raise ValueError(
            f"draft_dtype={draft_dtype!r} does not run on {device} ({type(error).__name__}: {error}): use another one, "
            "or None for the model's own dtype"
        ) from error


def dense_weight(projection: nn.Module) -> torch.Tensor:
    """Returns the weight of a projection as float [out_features, in_features], dequantized if need be."""
    if bnb.is_8bit(projection):
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(*bnb.int8_state(projection))
    if bnb.is_4bit(projection):
        from bitsandbytes import functional

        packed, state = projection.weight.data, projection.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            # Its forward has packed it anew for AVX-512. The dense module is to stay as it is, and the way back leaves
            # the scales as they were packed: [blocks of a row, rows].
            absmax = state.absmax.T.flatten().float()
            packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
            state.absmax, state.nested = absmax, False
        return functional.dequantize_4bit(packed, state)
    if is_opaque(projection):
        return _weight_by_products(projection)
    return neuron_weight(projection).detach()


def _weight_by_products(projection: nn.Module) -> torch.Tensor:
    """Returns the weight of a layer of some library, which is what it makes of the identity: as exact as its products,
    be the weight permuted, rotated or scaled in there.

    Raises:
        `ValueError` if the layer does not compute the product with a weight.
    """
    out_features, in_features = projection_shape(projection)
    weight = empty(out_features, in_features, projections.compute_dtype(projection), device_of(projection))
    # Many at a time, as libraries may dequantize all of the weight for each product.
    size = max(1, _PRODUCT // out_features)
    for start in range(0, in_features, size):
        stop = min(start + size, in_features)
        weight[:, start:stop] = projections.products_of_columns(projection, start, stop).T
    inputs = torch.arange(in_features).cos()[None]
    outputs = projections.product_without_bias(projection, inputs).float()
    expected = nn.functional.linear(inputs.to(weight), weight).float()
    # Layers that quantize their inputs as well differ by that.
    if not (outputs - expected).norm() <= _TOLERANCE * expected.norm():
        raise ValueError(f"{projections.unreadable(projection)} (what it computes is no product with a weight)")
    return weight


def num_elements(parameter: torch.Tensor) -> int:
    """Returns how many numbers a parameter stands for; two of a 4-bit one share a byte."""
    quant_state = getattr(parameter, "quant_state", None)
    return parameter.numel() if quant_state is None else math.prod(quant_state.shape)
