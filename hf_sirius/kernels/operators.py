"""The kernels as operators of torch, for graphs that torch.compile makes. A library defines each once for a process."""

from collections.abc import Callable

import torch
from torch import nn

from . import cpu


_library = torch.library.Library("hf_sirius", "DEF")


def linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_needed: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns inputs @ weight.T + bias in a graph, by a kernel where that is faster, which is seen as it runs.

    Args:
        is_needed: bool [out_features], of which outputs a kernel reads the rows alone. The others are of no use.
    """
    outputs = torch.ops.hf_sirius.linear(inputs, weight, is_needed)
    return outputs if bias is None else outputs + bias


def of(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns the operator of a kernel of `cpu.py`, which takes in place of rows which outputs are needed, bool
    [out_features]; of torch, the product itself.
    """
    if product is cpu.grouped_product:
        return torch.ops.hf_sirius.grouped_product
    return torch.ops.hf_sirius.int4_product if product is cpu.int4_product else product


def define(signature: str, compute: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> None:
    """Defines `torch.ops.hf_sirius.<name>` for a device's tensors, and by `fake` for those of a trace."""
    name = signature.partition("(")[0]
    _library.define(signature)
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_sirius::{name}", fake, lib=_library)


def _linear(inputs: torch.Tensor, weight: torch.Tensor, is_needed: torch.Tensor | None = None) -> torch.Tensor:
    if is_needed is not None and inputs.dtype == weight.dtype:
        return cpu.product(inputs.contiguous(), weight, _rows(is_needed))
    num_tokens = inputs.numel() // inputs.shape[-1]
    is_ours = inputs.dtype == weight.dtype and cpu.is_faster(weight.dtype, num_tokens)
    return cpu.product(inputs.contiguous(), weight) if is_ours else nn.functional.linear(inputs, weight)


def _rows(is_needed: torch.Tensor | None) -> torch.Tensor | None:
    # Within the operator: how many they are is no size that a graph could know.
    return None if is_needed is None else is_needed.nonzero().flatten()


def _grouped_product(
    inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, is_needed: torch.Tensor | None = None
) -> torch.Tensor:
    return cpu.grouped_product(inputs, values, scales, _rows(is_needed))


def _int4_product(
    inputs: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    columns: torch.Tensor,
    is_needed: torch.Tensor | None = None,
) -> torch.Tensor:
    return cpu.int4_product(inputs, values, scales, columns, _rows(is_needed))


def _outputs(inputs: torch.Tensor, weight: torch.Tensor, *_) -> torch.Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


def _all_outputs(inputs: torch.Tensor, weights: list[torch.Tensor], *_) -> list[torch.Tensor]:
    return [_outputs(inputs, weight) for weight in weights]


def _several(name: str) -> Callable[..., list[torch.Tensor]]:
    return lambda inputs, *tensors: cpu.Products(name, list(zip(*tensors, strict=True)))(inputs)


define("linear(Tensor inputs, Tensor weight, Tensor? is_needed=None) -> Tensor", _linear, _outputs)
define(
    "grouped_product(Tensor inputs, Tensor values, Tensor scales, Tensor? is_needed=None) -> Tensor",
    _grouped_product,
    _outputs,
)
define(
    "int4_product(Tensor inputs, Tensor values, Tensor scales, Tensor columns, Tensor? is_needed=None) -> Tensor",
    _int4_product,
    _outputs,
)
define(
    "grouped_products(Tensor inputs, Tensor[] values, Tensor[] scales) -> Tensor[]", _several("grouped"), _all_outputs
)
define(
    "int4_products(Tensor inputs, Tensor[] values, Tensor[] scales, Tensor[] columns) -> Tensor[]",
    _several("int4"),
    _all_outputs,
)
