"""The dtypes of a draft: projections cast, quantized or cut down to some neurons, also out of quantized models.

The quantized ones are bitsandbytes' own linear classes. Nothing here imports bitsandbytes unless it is used.
"""

import contextlib
import copy
import importlib.util
import math
import mmap
import threading
from collections.abc import Iterator

import torch
from torch import nn

from .mlp import neuron_weight, projection_shape


_NF4_BLOCK = 64  # values that share a scale, along a row
_NF4_ROWS = 32  # bitsandbytes' CPU kernel takes tiles of so many
_INT8_COLUMNS = 8  # integer products want their rows in whole words
# The dtype in which weights are gathered before they are quantized.
_GATHERED_AS = {"int8": torch.float16, "nf4": torch.bfloat16}
QUANTIZED_DTYPES = tuple(_GATHERED_AS)
_CHUNK = 2**20  # elements that are gathered at a time
OWN_MEMORY = 2**20  # bytes from which a tensor is worth a mapping of its own


class DraftLinear(nn.Module):
    """A projection that the draft holds by itself: takes and returns hidden states of the model's dtype.

    Args:
        linear: the projection, maybe padded with zeros.
        input_dtype: what `linear` takes.
        out_features: how many of its outputs are real.
    """

    def __init__(self, linear: nn.Module, input_dtype: torch.dtype, out_features: int):
        super().__init__()
        self.linear = linear
        self.input_dtype = input_dtype
        self.out_features = out_features

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        padding = self.linear.in_features - hidden_states.shape[-1]
        inputs = hidden_states.to(self.input_dtype)
        outputs = self.linear(nn.functional.pad(inputs, (0, padding)) if padding else inputs)
        return outputs[..., : self.out_features].to(hidden_states.dtype)


class _NativeProducts:
    """Takes oneDNN out of the way of bfloat16 drafts on a CPU.

    torch hands such a product to oneDNN where the processor has bfloat16 instructions, which for a single token took
    1.7 times as long as torch's own kernel does. The switch is global, so the last draft of all threads turns it back.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._num_drafts = 0
        self._was_enabled = True

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._num_drafts:
                # Not by `set_flags`, which sets the precision of float32 products as well.
                self._was_enabled = torch.backends.mkldnn.enabled
                torch.backends.mkldnn.enabled = False
            self._num_drafts += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_drafts -= 1
                if not self._num_drafts:
                    torch.backends.mkldnn.enabled = self._was_enabled


native_products = _NativeProducts()


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
        projection: an `nn.Linear`, a `Conv1D`, or one of bitsandbytes' 8-bit or 4-bit linear layers.
        draft_dtype: of `SiriusConfig`; `None` keeps the projection's own format.
        rows: long [num_rows], the outputs to keep, all by default.
        columns: long [num_columns], the inputs to keep, all by default.
        compute_dtype: the model's dtype, in which 4-bit layers compute; by default that of the weight.
        memory: uint8 [num_bytes], where a weight that is not quantized goes, if it fits and is to be on this device; by
            default new memory.
    """
    bias = projection.bias
    if bias is not None:
        bias = bias.detach() if rows is None else bias.detach().index_select(0, rows.to(bias.device))
    if is_8bit(projection) and draft_dtype in (None, "int8"):
        source, scales = _int8_state(projection)
        scales = scales if rows is None else scales.index_select(0, rows.to(scales.device))
        values = _int8_values(source, rows, columns)
        for place, piece in _pieces(source, rows, columns):
            values[place, : piece.shape[1]] = piece
        return _int8_linear(values, scales, bias, projection.state.threshold)
    quantized_as = draft_dtype
    if draft_dtype is None and is_4bit(projection):
        quantized_as = projection.weight.quant_state.quant_type
    source = dense_weight(projection)
    if quantized_as in (None, "bfloat16", "float16"):
        dtype = getattr(torch, quantized_as) if quantized_as else source.dtype
        linear = _linear(_select(source, rows, columns, dtype, memory), bias if bias is None else bias.to(dtype))
        return DraftLinear(linear, dtype, linear.out_features)
    if quantized_as == "int8":
        return _quantized_to_8bit(source, rows, columns, bias)
    if compute_dtype is None or not compute_dtype.is_floating_point:
        compute_dtype = source.dtype
    if compute_dtype == torch.float64:
        compute_dtype = torch.float32
    return _quantized_to_4bit(source, rows, columns, bias, quantized_as, compute_dtype)


def changes(projection: nn.Module, draft_dtype: str | None) -> bool:
    """Whether a draft of this dtype has another weight than the projection itself."""
    if is_4bit(projection):
        return draft_dtype not in (None, projection.weight.quant_state.quant_type)
    return draft_dtype is not None and str(projection.weight.dtype) != f"torch.{draft_dtype}"


def num_bytes(
    projection: nn.Module, draft_dtype: str | None, num_rows: int | None = None, num_columns: int | None = None
) -> int:
    """Returns the bytes of a `draft_linear` with so many rows and columns, all by default."""
    out_features, in_features = projection_shape(projection)
    out_features = out_features if num_rows is None else num_rows
    in_features = in_features if num_columns is None else num_columns
    has_bias = projection.bias is not None
    bias_itemsize = min(projection.bias.itemsize, torch.float32.itemsize) if has_bias else 0
    if draft_dtype is None:
        draft_dtype = "int8" if is_8bit(projection) else "nf4" if is_4bit(projection) else None
    if draft_dtype == "int8":
        return out_features * (_padded(in_features, _INT8_COLUMNS) + 4 + has_bias * torch.float16.itemsize)
    if draft_dtype == "nf4":  # fp4 takes as much
        rows, columns = _padded(out_features, _NF4_ROWS), _padded(in_features, _NF4_BLOCK)
        return rows * columns // 2 + rows * columns // _NF4_BLOCK * 4 + rows * bias_itemsize
    dtype = getattr(torch, draft_dtype) if draft_dtype else projection.weight.dtype
    return out_features * (in_features + has_bias) * dtype.itemsize


def narrowed(weight: torch.Tensor, draft_dtype: str | None) -> torch.Tensor:
    """Returns a weight in the dtype from which a draft of `draft_dtype` is gathered, if that takes less memory."""
    if draft_dtype is None:
        return weight
    dtype = _GATHERED_AS.get(draft_dtype) or getattr(torch, draft_dtype)
    return weight if dtype.itemsize >= weight.itemsize else _select(weight, None, None, dtype)


def num_kept_neurons(density: float, num_neurons: int, draft_dtype: str | None) -> int:
    """Returns how many neurons of an MLP a gathered draft keeps: whole blocks where they are packed in blocks."""
    num_kept = max(1, round(density * num_neurons))
    if draft_dtype == "nf4":
        num_kept = min(_padded(num_kept, _NF4_BLOCK), num_neurons)
    return num_kept


def check_draft_dtype(draft_dtype: str | None, device: torch.device) -> None:
    """Raises `ImportError` where a package is missing, and `ValueError` where the device cannot run this dtype."""
    if draft_dtype is None:
        return
    if draft_dtype in _GATHERED_AS and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"draft_dtype={draft_dtype!r} needs bitsandbytes: pip install hf_sirius[bnb], or use 'bfloat16'"
        )
    try:
        projection = _linear(torch.ones(_NF4_ROWS, _NF4_BLOCK, device=device), None)
        with torch.no_grad():
            draft_linear(projection, draft_dtype)(torch.ones(1, _NF4_BLOCK, device=device))
    except Exception as error:
        raise ValueError(
            f"draft_dtype={draft_dtype!r} does not run on {device} ({type(error).__name__}: {error}): use another one, "
            "or None for the model's own dtype"
        ) from error


def num_elements(parameter: torch.Tensor) -> int:
    """Returns how many numbers a parameter stands for; two of a 4-bit one share a byte."""
    quant_state = getattr(parameter, "quant_state", None)
    return parameter.numel() if quant_state is None else math.prod(quant_state.shape)


def is_8bit(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.") and hasattr(module, "state")


def is_4bit(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.") and hasattr(module.weight, "quant_type")


def dense_weight(projection: nn.Module) -> torch.Tensor:
    """Returns the weight of a projection as float [out_features, in_features], dequantized if need be."""
    if is_8bit(projection):
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(*_int8_state(projection))
    if is_4bit(projection):
        from bitsandbytes import functional

        packed, state = projection.weight.data, projection.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            # Its forward has packed it anew for AVX-512. The dense module is to stay as it is, and the way back leaves
            # the scales as they were packed: [blocks of a row, rows].
            absmax = state.absmax.T.flatten().float()
            packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
            state.absmax, state.nested = absmax, False
        return functional.dequantize_4bit(packed, state)
    return neuron_weight(projection).detach()


def _int8_state(projection: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (values, scales), int8 [out_features, in_features] and float32 [out_features]; the first forward moves
    them.
    """
    if projection.state.CB is not None:
        return projection.state.CB, projection.state.SCB
    return projection.weight.data, projection.weight.SCB


def _pieces(
    weight: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields the chosen part of a weight a few rows at a time, and where they go: each is converted while it is in the
    cache, with no large temporary (those of bitsandbytes' CPU code are several times as large as what it quantizes).
    """
    if columns is not None:
        columns = columns.to(weight.device)
    num_columns = weight.shape[1] if columns is None else len(columns)
    size = max(1, _CHUNK // num_columns)
    start = 0
    for source in weight.split(size) if rows is None else rows.to(weight.device).split(size):
        piece = source if rows is None else weight.index_select(0, source)
        if columns is not None:  # by gather, as index_select along rows took twice as long on a CPU
            piece = piece.gather(1, columns.expand(len(piece), -1))
        yield slice(start, start := start + len(piece)), piece


def _shape(weight: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None) -> tuple[int, int]:
    return weight.shape[0] if rows is None else len(rows), weight.shape[1] if columns is None else len(columns)


def _select(
    weight: torch.Tensor,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    dtype: torch.dtype,
    memory: torch.Tensor | None = None,
) -> torch.Tensor:
    selected = _empty(*_shape(weight, rows, columns), dtype, weight.device, memory)
    for place, piece in _pieces(weight, rows, columns):
        selected[place].copy_(piece)
    return selected


def _empty(
    num_rows: int,
    num_columns: int,
    dtype: torch.dtype,
    device: torch.device,
    memory: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns `torch.empty`, in `memory` if it fits, or in memory of its own."""
    num_bytes = num_rows * num_columns * dtype.itemsize
    if memory is None or memory.nbytes < num_bytes or memory.device != device:
        if device.type != "cpu" or num_bytes < OWN_MEMORY:
            return torch.empty(num_rows, num_columns, dtype=dtype, device=device)
        memory = own_memory(num_bytes)
    return memory[:num_bytes].view(dtype).view(num_rows, num_columns)


def own_memory(num_bytes: int) -> torch.Tensor:
    """Returns memory of a CPU, uint8 [num_bytes], which goes back to the system with the tensor: of what it takes from
    its heap for a draft, malloc kept most.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    mapped = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = _frozen(weight)
    if bias is not None:
        linear.bias = _frozen(bias)
    return linear


def _int8_linear(
    values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> DraftLinear:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    out_features, in_features = values.shape
    linear = Linear8bitLt(
        in_features, out_features, bias=bias is not None, has_fp16_weights=False, threshold=threshold, device="meta"
    )
    linear.weight = Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
    if bias is not None:
        linear.bias = _frozen(bias.to(torch.float16))
    # bitsandbytes casts to float16 by itself, and says so each time.
    return DraftLinear(linear.eval(), torch.float16, out_features)


def _int8_values(source: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
    """Returns int8 [num_rows, padded num_columns], of which the padding is zero and the rest is yet to be written."""
    num_rows, num_columns = _shape(source, rows, columns)
    values = _empty(num_rows, _padded(num_columns, _INT8_COLUMNS), torch.int8, source.device)
    values[:, num_columns:] = 0
    return values


def _quantized_to_8bit(
    source: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None, bias: torch.Tensor | None
) -> DraftLinear:
    from bitsandbytes.functional import int8_vectorwise_quant

    values = _int8_values(source, rows, columns)
    scales = torch.empty(len(values), dtype=torch.float32, device=source.device)
    for place, piece in _pieces(source, rows, columns):
        values[place, : piece.shape[1]], scales[place], _ = int8_vectorwise_quant(piece.to(_GATHERED_AS["int8"]))
    return _int8_linear(values, scales, bias, threshold=0.0)


def _quantized_to_4bit(
    source: torch.Tensor,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    bias: torch.Tensor | None,
    quant_type: str,
    compute_dtype: torch.dtype,
) -> DraftLinear:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    num_rows, num_columns = _shape(source, rows, columns)
    # bitsandbytes packs without regard to rows, and its CPU kernel takes whole tiles.
    out_features, in_features = _padded(num_rows, _NF4_ROWS), _padded(num_columns, _NF4_BLOCK)
    packed = _empty(out_features, in_features // 2, torch.uint8, source.device)
    # By which the rows that are none are zero.
    scales = torch.zeros(out_features, in_features // _NF4_BLOCK, device=source.device)
    for place, piece in _pieces(source, rows, columns):
        piece = nn.functional.pad(piece.to(_GATHERED_AS["nf4"]), (0, in_features - num_columns))
        values, state = quantize_4bit(piece, quant_type=quant_type)
        packed[place], scales[place] = values.view(len(piece), -1), state.absmax.view(len(piece), -1)
    state.shape, state.absmax = torch.Size((out_features, in_features)), scales.flatten()
    linear = Linear4bit(
        in_features, out_features, bias=bias is not None, compute_dtype=compute_dtype,
        compress_statistics=False, quant_type=quant_type, device="meta",
    )  # fmt: skip
    # Without its `module`, which would make a cycle that keeps the weight until the garbage collector comes.
    linear.weight = Params4bit(
        packed.view(-1, 1), quant_state=state, quant_type=quant_type, compress_statistics=False, bnb_quantized=True
    )
    linear.quant_state = state
    if bias is not None:
        linear.bias = _frozen(nn.functional.pad(bias.to(compute_dtype), (0, out_features - num_rows)))
    return DraftLinear(linear.eval(), compute_dtype, num_rows)
