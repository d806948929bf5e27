"""Projections outside the MLPs in a draft's dtype. They depend on no prompt, so they are made once for all calls."""

from collections.abc import Iterable
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from .quantization import DraftLinear, draft_linear


_NUM_SAMPLES = 1024  # of a weight

# projection -> draft_dtype -> its cast, as long as any twin has it
_shared: "WeakKeyDictionary[nn.Module, WeakValueDictionary[str, _Cast]]" = WeakKeyDictionary()


class _Cast:
    """A projection as it was when it was cast, and what drafts have in its place."""

    def __init__(self, projection: nn.Module, draft_dtype: str):
        self.linear = draft_linear(projection, draft_dtype, compute_dtype=projection.weight.dtype)
        self._marks, self._samples = _marks(projection), [samples.clone() for samples in _samples(projection)]

    def is_of(self, projection: nn.Module) -> bool:
        """Whether the projection is still what it was: not moved, cast, loaded or written to."""
        return self._marks == _marks(projection) and all(map(torch.equal, self._samples, _samples(projection)))


def _marks(projection: nn.Module) -> list[tuple]:
    return [
        (p.data_ptr(), p.device, p.dtype, p.shape, None if p.is_inference() else p._version)
        for p in projection.parameters()
    ]


def _samples(projection: nn.Module) -> list[torch.Tensor]:
    """Returns some numbers of each parameter: what is written through `.data`, as merges do, shows in these alone."""
    flat = [p.detach().flatten() for p in projection.parameters()]
    return [values[:: max(1, len(values) // _NUM_SAMPLES)] for values in flat]


class Casts:
    """The casts of one twin's projections; twins of one `draft_dtype` share them.

    Args:
        projections: of the dense model, with their weights in memory.
        draft_dtype: of `SiriusConfig`.
    """

    def __init__(self, projections: Iterable[nn.Module], draft_dtype: str | None):
        self._projections = list(projections)
        self._draft_dtype = draft_dtype
        self._kept: dict[nn.Module, _Cast] = {}

    @torch.no_grad()
    def current(self) -> dict[nn.Module, DraftLinear]:
        """Returns the cast of each projection. Where its weights are others by now, it is made anew."""
        for projection in self._projections:
            of_dtype = _shared.setdefault(projection, WeakValueDictionary())
            cast = of_dtype.get(self._draft_dtype)
            if cast is None or not cast.is_of(projection):
                cast = of_dtype[self._draft_dtype] = _Cast(projection, self._draft_dtype)
            self._kept[projection] = cast
        return {projection: cast.linear for projection, cast in self._kept.items()}

    def clear(self) -> None:
        """Lets go of the casts, which are freed unless another twin has them."""
        self._kept.clear()
