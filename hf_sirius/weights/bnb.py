"""bitsandbytes' own linear classes, made of some rows or columns, and read back; it is imported when it is used."""

import torch
from torch import nn

from .gather import Selection, empty, padded
from .linear import DraftLinear, frozen


NF4_BLOCK = 64  # values that share a scale, along a row
NF4_ROWS = 32  # bitsandbytes' CPU kernel takes tiles of so many
INT8_COLUMNS = 8  # integer products want their rows in whole words


def is_8bit(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.") and hasattr(module, "state")


def is_4bit(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.") and hasattr(module.weight, "quant_type")


def int8_state(projection: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns int8 [out_features, in_features] and float32 scales [out_features]; the first forward moves them."""
    if projection.state.CB is not None:
        return projection.state.CB, projection.state.SCB
    return projection.weight.data, projection.weight.SCB


def int8_linear(values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, threshold: float) -> DraftLinear:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    out_features, in_features = values.shape
    linear = Linear8bitLt(
        in_features, out_features, bias=bias is not None, has_fp16_weights=False, threshold=threshold, device="meta"
    )
    linear.weight = Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
    if bias is not None:
        linear.bias = frozen(bias.to(torch.float16))
    # bitsandbytes casts to float16 by itself, and says so each time.
    return DraftLinear(linear.eval(), [torch.float16], out_features)


def int8_values(source: Selection) -> torch.Tensor:
    """Returns int8 [num_rows, padded num_columns], of which the padding is zero and the rest is yet to be written."""
    num_rows, num_columns = source.shape
    values = empty(num_rows, padded(num_columns, INT8_COLUMNS), torch.int8, source.weight.device)
    values[:, num_columns:] = 0
    return values


def quantized_to_8bit(source: Selection, bias: torch.Tensor | None) -> DraftLinear:
    from bitsandbytes.functional import int8_vectorwise_quant

    values = int8_values(source)
    scales = torch.empty(len(values), dtype=torch.float32, device=values.device)
    for place, piece in source.pieces():
        values[place, : piece.shape[1]], scales[place], _ = int8_vectorwise_quant(
            # Its CUDA kernel wants float16, and reads the memory as it lies: a Conv1D is stored the other way about.
            piece.to(torch.float16).contiguous()
        )
    return int8_linear(values, scales, bias, threshold=0.0)


def quantized_to_4bit(
    source: Selection, bias: torch.Tensor | None, quant_type: str, compute_dtype: torch.dtype
) -> DraftLinear:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    num_rows, num_columns = source.shape
    # bitsandbytes packs without regard to rows, and its CPU kernel takes whole tiles.
    out_features, in_features = padded(num_rows, NF4_ROWS), padded(num_columns, NF4_BLOCK)
    packed = empty(out_features, in_features // 2, torch.uint8, source.weight.device)
    # By which the rows that are none are zero.
    scales = torch.zeros(out_features, in_features // NF4_BLOCK, device=packed.device)
    for place, piece in source.pieces():
        piece = nn.functional.pad(piece.to(torch.bfloat16), (0, in_features - num_columns)).contiguous()
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
        linear.bias = frozen(nn.functional.pad(bias.to(compute_dtype), (0, out_features - num_rows)))
    return DraftLinear(linear.eval(), [compute_dtype], num_rows)
