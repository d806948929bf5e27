"""What a twin keeps from call to call: casts, which depend on no prompt, and on a CPU the memory for gathered neurons.

Twins of one model share both, as far as they need the same.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from .quantization import DraftLinear, draft_linear, own_memory


_NUM_SAMPLES = 1024  # of a weight

# projection -> draft_dtype or number of bytes -> what is kept of it, as long as any twin has it
_shared: "WeakKeyDictionary[nn.Module, WeakValueDictionary[str | int, _Cast | _Buffer]]" = WeakKeyDictionary()
_lock = threading.Lock()


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


class _Buffer:
    """Memory that one call at a time may write to."""

    def __init__(self, num_bytes: int):
        # Written to now: the first use of a page may cost more than all that is copied into it later.
        self.memory = own_memory(num_bytes).zero_()
        self.is_taken = False


class Kept:
    """What one twin keeps.

    Args:
        projections: those outside the MLPs that the draft casts, with their weights in memory.
        draft_dtype: of `SiriusConfig`.
        num_bytes: how much memory the gathered neurons of a projection take.
    """

    def __init__(self, projections: Iterable[nn.Module], draft_dtype: str | None, num_bytes: Mapping[nn.Module, int]):
        self._projections = list(projections)
        self._draft_dtype = draft_dtype
        self._casts: dict[nn.Module, _Cast] = {}
        self._buffers: dict[nn.Module, _Buffer] = {}
        for part, size in num_bytes.items():
            of_part = _shared.setdefault(part, WeakValueDictionary())
            if (buffer := of_part.get(size)) is None:
                buffer = of_part[size] = _Buffer(size)
            self._buffers[part] = buffer
        self.casts()  # now, and not in the first call

    @torch.no_grad()
    def casts(self) -> dict[nn.Module, DraftLinear]:
        """Returns the cast of each projection. Where its weights are others by now, it is made anew."""
        for projection in self._projections:
            of_projection = _shared.setdefault(projection, WeakValueDictionary())
            cast = of_projection.get(self._draft_dtype)
            if cast is None or not cast.is_of(projection):
                cast = of_projection[self._draft_dtype] = _Cast(projection, self._draft_dtype)
            self._casts[projection] = cast
        return {projection: cast.linear for projection, cast in self._casts.items()}

    @contextlib.contextmanager
    def memory(self) -> Iterator[dict[nn.Module, torch.Tensor]]:
        """Yields the memory for each projection's neurons, uint8 [num_bytes], as far as no other call has it."""
        with _lock:
            free = {part: buffer for part, buffer in self._buffers.items() if not buffer.is_taken}
            for buffer in free.values():
                buffer.is_taken = True
        try:
            yield {part: buffer.memory for part, buffer in free.items()}
        finally:
            for buffer in free.values():
                buffer.is_taken = False

    def clear(self) -> None:
        """Lets go of all, which is freed unless another twin has it or a call is using it."""
        self._casts.clear()
        self._buffers.clear()
