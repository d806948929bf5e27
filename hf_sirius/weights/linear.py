"""A projection that a draft holds by itself, in the format of `formats.py`."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..kernels import cpu
from ..model.projections import is_opaque
from ..model.shared import SharedContext


_MAX_TOKENS = 4  # up to which a kernel is faster than torch


def read_rows(module: nn.Module, inputs: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor | None:
    """Returns module(inputs), of which some rows are read alone, in place; `None` where no kernel does so.

    Args:
        module: what a draft runs: a projection of the model, or what is held in its place.
        inputs: [..., in_features].
        rows: long [num_rows], the outputs that are needed, all by default. The others are of no use.
    """
    if isinstance(module, DraftLinear):
        return module(inputs, rows) if module.reads_rows(_num_tokens(inputs)) else None
    # Hooks are not passed by.
    is_hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return None if type(module) is not nn.Linear or is_hooked else _kernel_product(module, inputs, rows)


def has_kernel(module: nn.Module) -> bool:
    """Whether a kernel reads the weight of a layer as it is."""
    if not isinstance(module, nn.Linear) or is_opaque(module):
        return False
    weight = module.weight
    return (
        weight.dtype in (torch.float32, torch.bfloat16)
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and cpu.is_available()
    )


def _kernel_product(linear: nn.Linear, inputs: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor | None:
    if _num_tokens(inputs) > _MAX_TOKENS or inputs.dtype != linear.weight.dtype or torch.is_grad_enabled():
        return None
    if not has_kernel(linear):
        return None
    outputs = cpu.product(inputs.flatten(0, -2).float().contiguous(), linear.weight.detach(), rows).to(inputs.dtype)
    if linear.bias is not None:
        outputs += linear.bias
    return outputs.view(*inputs.shape[:-1], -1)


def _num_tokens(inputs: torch.Tensor) -> int:
    return inputs.numel() // inputs.shape[-1]


class PlainLinear(nn.Linear):
    """A weight that is not packed."""

    def reads_rows(self, num_tokens: int) -> bool:
        return num_tokens <= _MAX_TOKENS and has_kernel(self)

    def forward(self, inputs: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        outputs = _kernel_product(self, inputs, rows)
        return super().forward(inputs) if outputs is None else outputs


class DraftLinear(nn.Module):
    """A projection that the draft holds by itself: takes and returns hidden states of the model's dtype.

    `linear` takes `input_dtype`, and may be padded with zeros: `out_features` of its outputs are real.
    """

    def __init__(self, linear: nn.Module, input_dtype: torch.dtype, out_features: int):
        super().__init__()
        self.linear = linear
        self.input_dtype = input_dtype
        self.out_features = out_features

    def reads_rows(self, num_tokens: int) -> bool:
        """Whether a kernel reads some rows of the weight alone, for so many tokens."""
        return hasattr(self.linear, "reads_rows") and self.linear.reads_rows(num_tokens)

    def forward(self, hidden_states: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        padding = self.linear.in_features - hidden_states.shape[-1]
        inputs = hidden_states.to(self.input_dtype)
        inputs = nn.functional.pad(inputs, (0, padding)) if padding else inputs
        outputs = self.linear(inputs) if rows is None else self.linear(inputs, rows)
        return outputs[..., : self.out_features].to(hidden_states.dtype)


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Takes oneDNN out of the way of bfloat16 drafts on a CPU.

    torch hands such a product to oneDNN where the processor has bfloat16 instructions, which for a single token took
    1.7 times as long as torch's own kernel does.
    """
    was_enabled = torch.backends.mkldnn.enabled
    # Not by `set_flags`, which sets the precision of float32 products as well.
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = was_enabled


def is_native_faster(module: nn.Module) -> bool:
    """Whether what a draft holds is a weight in bfloat16, on a CPU, as it is."""
    linear = getattr(module, "linear", module)
    weight = getattr(linear, "weight", None)
    return isinstance(linear, nn.Linear) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


native_products = SharedContext(_without_onednn)


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> PlainLinear:
    out_features, in_features = weight.shape
    linear = PlainLinear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = frozen(weight)
    if bias is not None:
        linear.bias = frozen(bias)
    return linear
