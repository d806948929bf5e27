"""The modules of a twin that stand in for dense ones, and how they find the weights of the running draft."""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import torch
from torch import nn

from .joint import JointProducts
from .linear import DraftLinear, run


# What a draft has in place of dense modules, and what runs those of its projections that it holds.
_reading: ContextVar[tuple[Mapping[nn.Module, nn.Module], JointProducts] | None] = ContextVar(
    "hf_sirius_reading", default=None
)


@contextlib.contextmanager
def reading(held: Mapping[nn.Module, nn.Module], joint: JointProducts) -> Iterator[None]:
    """Within the block, the twin's modules in this context run what a draft holds in place of the dense ones.

    Args:
        held: dense module -> what the draft has in its place.
        joint: runs those that are projections.
    """
    token = _reading.set((held, joint))
    try:
        yield
    finally:
        joint.clear()
        _reading.reset(token)


def run_in_draft(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Returns what a projection of a running draft makes of its inputs, [..., in_features]."""
    # Not called as a module: it has no hooks, and a small product takes no longer than that.
    return _reading.get()[1](module, inputs) if type(module) is DraftLinear else run(module, inputs)


class TwinModule(nn.Module):
    """Stands in for a module in the twin: the same parameters, and for drafts maybe a copy that the call holds.

    It shares the very dicts of parameters and buffers with the dense module, so the twin's state dict has the dense
    model's names, and whatever is moved, cast or loaded there is here at once.
    """

    def __init__(self, dense: nn.Module):
        super().__init__()
        self.__dict__["dense"] = dense  # not a submodule: its parameters are already ours
        self._parameters, self._buffers, self._modules = dense._parameters, dense._buffers, dense._modules

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("_hf_hook", "_old_forward"):  # of the dense module, and not to be taken off here
                raise
            return getattr(self.dense, name)  # such as the eps of a norm

    def current(self) -> nn.Module:
        """Returns what runs in its place: what the draft of this context holds, or the dense module."""
        of_draft = _reading.get()
        return self.dense if of_draft is None else of_draft[0].get(self.dense, self.dense)

    def forward(self, *args, **kwargs):
        module = self.current()
        return run_in_draft(module, *args, **kwargs) if type(module) is DraftLinear else module(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"of {self.dense}"


class TwinProjection(TwinModule):
    """Stands in for a projection, whose weight a draft reads by a kernel where there is one."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        # Outside of drafts it is the dense one.
        return self.dense(inputs) if _reading.get() is None else run_in_draft(self.current(), inputs)
