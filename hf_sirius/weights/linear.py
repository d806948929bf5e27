"""A projection that a draft holds by itself, in the format of `formats.py`."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..model.shared import SharedContext


class DraftLinear(nn.Module):
    """A projection that the draft holds by itself: takes and returns hidden states of the model's dtype.

    `linear` takes `input_dtype`, and may be padded with zeros: `out_features` of its outputs are real.
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


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = frozen(weight)
    if bias is not None:
        linear.bias = frozen(bias)
    return linear
