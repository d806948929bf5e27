"""The kernels as operators of torch, for graphs that torch.compile makes. A library defines each once for a process."""

from collections.abc import Callable

import torch
from torch import nn

from . import cpu


_library = torch.library.Library("hf_sirius", "DEF")


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns inputs @ weight.T + bias in a graph, by a kernel where that is faster, which is seen as it runs."""
    outputs = torch.ops.hf_sirius.linear(inputs, weight)
    return outputs if bias is None else outputs + bias


def of(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns the operator of a kernel of `cpu.py`; of torch, the product itself."""
    if product is cpu.grouped_product:
        return torch.ops.hf_sirius.grouped_product
    return torch.ops.hf_sirius.int4_product if product is cpu.int4_product else product


def define(signature: str, compute: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> None:
    """Defines `torch.ops.hf_sirius.<name>` for a device's tensors, and by `fake` for those of a trace."""
    name = signature.partition("(")[0]
    _library.define(signature)
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_sirius::{name}", fake, lib=_library)


def _linear(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    num_tokens = inputs.numel() // inputs.shape[-1]
    is_ours = inputs.dtype == weight.dtype and cpu.is_faster(weight.dtype, num_tokens)
    return cpu.product(inputs.contiguous(), weight) if is_ours else nn.functional.linear(inputs, weight)


def _outputs(inputs: torch.Tensor, weight: torch.Tensor, *_) -> torch.Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


def _all_outputs(inputs: torch.Tensor, weights: list[torch.Tensor], *_) -> list[torch.Tensor]:
    return [_outputs(inputs, weight) for weight in weights]


def _several(name: str) -> Callable[..., list[torch.Tensor]]:
    return lambda inputs, *tensors: cpu.Products(name, list(zip(*tensors, strict=True)))(inputs)


define("linear(Tensor inputs, Tensor weight) -> Tensor", _linear, _outputs)
define("grouped_product(Tensor inputs, Tensor values, Tensor scales) -> Tensor", cpu.grouped_product, _outputs)
define(
    "int4_product(Tensor inputs, Tensor values, Tensor scales, Tensor columns) -> Tensor", cpu.int4_product, _outputs
)
define(
    "grouped_products(Tensor inputs, Tensor[] values, Tensor[] scales) -> Tensor[]", _several("grouped"), _all_outputs
)
define(
    "int4_products(Tensor inputs, Tensor[] values, Tensor[] scales, Tensor[] columns) -> Tensor[]",
    _several("int4"),
    _all_outputs,
)
