"""Products of a draft with the same inputs, of queries, keys and values or of gate and up, in one call of a kernel."""

from collections.abc import Collection

import torch

from ..kernels import cpu
from .linear import DraftLinear
from .packed import PackedLinear


class JointProducts:
    """Runs a draft's own projections, one after the other. Which of them take the very same inputs shows in the first
    step: from then on the first of them computes the outputs of the others as well. Belongs to one draft.
    """

    def __init__(self):
        self._groups: dict[DraftLinear, _Group] = {}  # by the first
        self._made: dict[DraftLinear, torch.Tensor] = {}  # that nobody has asked for yet
        self._version: int | None = None
        self.clear()

    def clear(self) -> None:
        """Lets go of inputs and outputs."""
        self._leave_unasked()
        self._inputs: torch.Tensor | None = None
        self._group: _Group | None = None  # that had them

    def __call__(self, linear: DraftLinear, inputs: torch.Tensor) -> torch.Tensor:
        """Returns linear(inputs)."""
        version = None if inputs.is_inference() else inputs._version  # those of inference mode do not count it
        if inputs is self._inputs and version == self._version and self._group is not None:
            outputs = self._made.pop(linear, None)
            if outputs is None:
                self._group.add(linear)
                outputs = linear.forward(inputs)
            return outputs
        self._leave_unasked()
        self._inputs, self._version = inputs, version
        group = self._groups.get(linear)
        if group is None:
            group = self._groups[linear] = _Group(linear)
        self._group = group if group.fits(inputs) else None
        if self._group is None:
            return linear.forward(inputs)
        outputs, *of_others = group(inputs)
        if of_others:
            self._made = dict(zip(group.linears[1:], of_others, strict=True))
        return outputs

    def _leave_unasked(self) -> None:
        if self._made:  # in vain, as it takes other inputs after all
            self._group.remove(self._made)
        self._made = {}


class _Group:
    """Projections that took the same inputs so far, and can do so in one call of a kernel."""

    def __init__(self, first: DraftLinear):
        self.linears = [first]
        self._removed: set[DraftLinear] = set()  # for good: else one that comes and goes would be made in vain again
        self._products = self._prepared() if _is_readable(first) else None

    def fits(self, inputs: torch.Tensor) -> bool:
        """Whether the kernel takes inputs as they are."""
        is_whole = inputs.shape[-1] == self.linears[0].in_features
        return self._products is not None and is_whole and inputs.is_cpu and inputs.dtype in cpu.DTYPES

    def add(self, linear: DraftLinear) -> None:
        first = self.linears[0]
        is_new = linear not in self.linears and linear not in self._removed
        is_alike = _is_readable(linear) and linear.linear.kernel == first.linear.kernel
        if is_new and is_alike and linear.in_features == first.in_features:
            self.linears.append(linear)
            self._products = self._prepared()

    def remove(self, linears: Collection[DraftLinear]) -> None:
        self._removed.update(linears)
        self.linears = [linear for linear in self.linears if linear not in linears]
        self._products = self._prepared()

    def _prepared(self) -> cpu.Products:
        all_packed = [linear.linear for linear in self.linears]
        self._biases = [packed.bias for packed in all_packed]
        # A parameter may be given other memory.
        weights = [[tensor.detach() for tensor in packed.tensors] for packed in all_packed]
        return cpu.Products(all_packed[0].kernel, weights)

    def __call__(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        all_outputs = self._products(inputs.contiguous())
        for outputs, bias in zip(all_outputs, self._biases, strict=True):
            if bias is not None:
                outputs += bias
        return all_outputs


def _is_readable(linear: DraftLinear) -> bool:
    return type(linear.linear) is PackedLinear and linear.linear.kernel is not None
