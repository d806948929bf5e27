"""Weights of 4 and 8 bits, in products that take as long as their bytes: the fastest that torch or numba has for a few
tokens on this device.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..kernels import cpu, operators
from .gather import Selection, empty, padded
from .linear import DraftLinear, frozen


INT4_GROUP = 32  # inputs that share a scale and a zero point
ROWS = 64  # outputs that torch's kernels take together
_INNER_K_TILES = 8  # how its CUDA kernel lays out 4 bits: 128 inputs at a time


def _int8(inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return _by_rows(torch.ops.aten._weight_int8pack_mm, inputs, weight, scales)


def _int4_on_cpu(
    inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    return _by_rows(torch.ops.aten._weight_int4pack_mm_for_cpu, inputs * columns, weight, INT4_GROUP, scales)


def _int4_on_cuda(
    inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    return _by_rows(torch.ops.aten._weight_int4pack_mm, inputs * columns, weight, INT4_GROUP, scales)


def _by_rows(product: Callable[..., torch.Tensor], inputs: torch.Tensor, *others: Any) -> torch.Tensor:
    """Returns the outputs [..., out_features] of a product that takes inputs [num_tokens, in_features] alone."""
    outputs = product(inputs.reshape(-1, inputs.shape[-1]).contiguous(), *others)
    return outputs.view(*inputs.shape[:-1], -1)


class PackedLinear(nn.Module):
    """A projection whose weight only its product can read.

    Args:
        product: takes inputs [..., in_features], the weight, its scales and its columns, if it has any, and maybe the
            rows to read; returns [..., out_features].
        weight: int8 [out_features, in_features], or 4 bits as torch packs them.
        scales: of the groups of inputs; of 4 bits with zero points.
        bias: [out_features], or `None`.
        in_features: of the weight, padding included.
        columns: what the inputs are multiplied with, [in_features], or `None`.

    Attributes:
        kernel: of ours that reads the weight, by name; `None` where it is torch's.
    """

    def __init__(
        self,
        product: Callable[..., torch.Tensor],
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        in_features: int,
        columns: torch.Tensor | None = None,
    ):
        super().__init__()
        self.product, self.in_features = product, in_features
        self.weight, self.scales = frozen(weight), frozen(scales)
        self.register_parameter("bias", None if bias is None else frozen(bias))
        self.register_parameter("columns", None if columns is None else frozen(columns))
        given = self.weight, self.scales, self.columns
        self.tensors = [tensor for tensor in given if tensor is not None]  # that the product takes behind the inputs
        self.kernel = {cpu.grouped_product: "grouped", cpu.int4_product: "int4"}.get(product)

    def reads_needed(self, num_tokens: int) -> bool:
        return self.kernel is not None

    def forward(self, inputs: torch.Tensor, is_needed: torch.Tensor | None = None) -> torch.Tensor:
        is_traced = torch.compiler.is_dynamo_compiling()
        chosen = () if is_needed is None else (is_needed if is_traced else is_needed.nonzero().flatten(),)
        product = operators.of(self.product) if is_traced else self.product
        outputs = product(inputs.contiguous(), *self.tensors, *chosen)
        bias = self._parameters["bias"]  # not by getattr, which takes as long as a small product
        if bias is not None:
            outputs += bias
        return outputs


def int8_linear(source: Selection, bias: torch.Tensor | None) -> DraftLinear:
    """Returns some rows and columns of a weight in 8 bits, on a CPU: with a scale for each 64 inputs where numba is
    there, else with one for each output, in bfloat16.
    """
    num_rows, num_columns = source.shape
    is_grouped = cpu.is_available()
    dtype = torch.float32 if is_grouped else torch.bfloat16
    shape = int8_shape(num_rows, num_columns)
    group = cpu.GROUP if is_grouped else shape[1]
    values = empty(*shape, torch.int8, source.weight.device)
    scales = torch.zeros(shape[0], shape[1] // group, dtype=dtype, device=source.weight.device)
    values[num_rows:] = 0
    for place, piece in source.pieces():
        groups = _in_groups(piece, shape[1], group)
        scale = (groups.abs().amax(dim=-1, keepdim=True) / 127).to(dtype)
        scales[place] = scale.squeeze(-1)
        # By the scale as it is kept, which is 0 where all are.
        groups = torch.where(scale > 0, groups / scale.float(), 0.0).round_().clamp_(-127, 127)
        values[place] = groups.flatten(1).to(torch.int8)
    bias = None if bias is None else nn.functional.pad(bias.to(dtype), (0, shape[0] - num_rows))
    product, scales = (cpu.grouped_product, scales) if is_grouped else (_int8, scales.flatten())
    dtypes = cpu.DTYPES if is_grouped else [dtype]
    return DraftLinear(PackedLinear(product, values, scales, bias, shape[1]), dtypes, num_rows)


def int8_shape(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Returns the shape of a weight in 8 bits, padding included."""
    return num_rows if cpu.is_available() else padded(num_rows, ROWS), padded(num_columns, cpu.GROUP)


def int8_bytes(num_rows: int, num_columns: int, has_bias: bool) -> int:
    """Returns the bytes of an [`int8_linear`]."""
    num_rows, num_columns = int8_shape(num_rows, num_columns)
    if cpu.is_available():
        return num_rows * (num_columns + 4 * (num_columns // cpu.GROUP) + 4 * has_bias)
    return num_rows * (num_columns + 2 + 2 * has_bias)


def int4_linear(source: Selection, bias: torch.Tensor | None) -> DraftLinear:
    """Returns some rows and columns of a weight in 4 bits, with a scale and a zero point for each 32 inputs.

    Each column is divided by its mean magnitude, and its input multiplied with it, so that no column takes a group's
    range for itself. (Of the tokens of SmolLM2 .90 are then the full model's, else .82.)
    """
    num_rows, num_columns = source.shape
    device, is_ours = source.weight.device, has_int4_kernel(source.weight.device)
    out_features, in_features = int4_shape(num_rows, num_columns, device)
    columns = torch.zeros(in_features, device=device)
    for _, piece in source.pieces():
        columns[:num_columns] += piece.float().abs().sum(dim=0)
    columns = (columns / num_rows).to(torch.bfloat16)
    divisors = columns.float().masked_fill_(columns == 0, 1.0)
    values = empty(out_features, in_features, torch.uint8, device).zero_()
    scales = torch.zeros(out_features, in_features // INT4_GROUP, 2, dtype=torch.bfloat16, device=device)
    middle = 0 if is_ours else 8  # torch's kernels add the zero point to -8 to 7, ours to 0 to 15
    for place, piece in source.pieces():
        groups = (_in_groups(piece, in_features, in_features) / divisors).view(len(piece), -1, INT4_GROUP)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / 15).to(torch.bfloat16)
        zero = (low + middle * scale).to(torch.bfloat16)
        # As they are kept, so that what rounding them loses is not lost twice.
        groups = torch.where(scale > 0, (groups - zero.float()) / scale.float(), 0.0).round_()
        values[place] = groups.clamp_(-middle, 15 - middle).add_(middle).flatten(1).to(torch.uint8)
        scales[place] = torch.cat([scale, zero], dim=-1)
    bias = None if bias is None else nn.functional.pad(bias.to(torch.bfloat16), (0, out_features - num_rows))
    if is_ours:
        linear = PackedLinear(cpu.int4_product, _packed_in_chunks(values), scales, bias, in_features, columns)
        return DraftLinear(linear, cpu.DTYPES, num_rows)
    pack = _packed_for_cuda if device.type == "cuda" else _packed_for_cpu
    packed = torch.cat([pack(block) for block in values.split(16 * ROWS)])
    scales = scales.transpose(0, 1).contiguous()
    product = _int4_on_cuda if device.type == "cuda" else _int4_on_cpu
    return DraftLinear(PackedLinear(product, packed, scales, bias, in_features, columns), [torch.bfloat16], num_rows)


def has_int4_kernel(device: torch.device) -> bool:
    """Whether 4 bits are read by our own kernel: where torch's does not clearly take less time."""
    return device.type == "cpu" and cpu.is_available() and _is_int4_kernel_faster()


@functools.cache
def _is_int4_kernel_faster() -> bool:
    num_rows, num_columns = 8192, 1024
    inputs = torch.ones(1, num_columns, dtype=torch.float32, device="cpu")
    values = torch.zeros(num_rows, num_columns, dtype=torch.uint8, device="cpu")
    scales = torch.ones(num_rows, num_columns // INT4_GROUP, 2, dtype=torch.bfloat16, device="cpu")
    columns = torch.ones(num_columns, dtype=torch.bfloat16, device="cpu")
    ours = _packed_in_chunks(values), scales, columns
    theirs = _packed_for_cpu(values), scales.transpose(0, 1).contiguous(), columns
    # In doubt ours, which makes several products in one call.
    return not cpu.takes_less(
        lambda: _int4_on_cpu(inputs.bfloat16(), *theirs).float(), lambda: cpu.int4_product(inputs, *ours)
    )


def _packed_in_chunks(values: torch.Tensor) -> torch.Tensor:
    chunks = values.view(len(values), -1, 2, cpu.GROUP // 2)
    return (chunks[:, :, 0] | chunks[:, :, 1] << 4).flatten(1).contiguous()


def _packed_for_cpu(values: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.to(torch.int32), 1)


def _packed_for_cuda(values: torch.Tensor) -> torch.Tensor:
    pairs = values[:, ::2] << 4 | values[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_K_TILES)


def int4_shape(num_rows: int, num_columns: int, device: torch.device) -> tuple[int, int]:
    """Returns the shape of a weight in 4 bits, padding included."""
    if has_int4_kernel(device):
        return num_rows, padded(num_columns, cpu.GROUP)
    return padded(num_rows, ROWS), padded(num_columns, 16 * _INNER_K_TILES if device.type == "cuda" else INT4_GROUP)


def int4_bytes(num_rows: int, num_columns: int, has_bias: bool, device: torch.device) -> int:
    """Returns the bytes of an [`int4_linear`]."""
    num_rows, num_columns = int4_shape(num_rows, num_columns, device)
    return num_rows * num_columns // 2 + num_rows * (num_columns // INT4_GROUP * 4 + 2 * has_bias) + 2 * num_columns


def _in_groups(piece: torch.Tensor, num_columns: int, group: int) -> torch.Tensor:
    """Returns rows of a weight in float32, padded with zeros to `num_columns`, [num_rows, num_groups, group]."""
    piece = nn.functional.pad(piece.float(), (0, num_columns - piece.shape[1]))
    return piece.view(len(piece), -1, group)
