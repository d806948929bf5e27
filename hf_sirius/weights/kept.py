"""What twins of a model keep from call to call, and share: casts, and on a CPU the memory for gathered neurons."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from ..model.adapters import adapters_of
from ..model.projections import compute_dtype, device_of, plain_tensors, projection_shape
from .formats import changes, draft_linear
from .gather import own_memory
from .shortlist import SHORTLIST, ShortlistHead


# projection -> draft_dtype or number of bytes -> what is kept of it, as long as any twin has it
_shared: "WeakKeyDictionary[nn.Module, WeakValueDictionary[str | int, _Cast | _Buffer]]" = WeakKeyDictionary()
_lock = threading.Lock()


class _Cast:
    """A projection as it was when it was cast, and what drafts have in its place."""

    def __init__(self, projection: nn.Module, draft_dtype: str, head_inputs: Callable[[], torch.Tensor]):
        tensors = list(plain_tensors(projection))
        self._marks, self._samples = _marks(projection, tensors), [samples.clone() for samples in _samples(tensors)]
        if draft_dtype == SHORTLIST:
            self.linear: nn.Module = ShortlistHead(projection, head_inputs())
        else:
            self.linear = draft_linear(projection, draft_dtype, compute_dtype=compute_dtype(projection))
        # bitsandbytes' layers settle in their first forward, which is not made for several threads.
        inputs = torch.ones(1, projection_shape(projection)[1], dtype=self.linear.input_dtypes[0])
        self.linear(inputs.to(device_of(projection)))

    def is_of(self, projection: nn.Module) -> bool:
        """Whether the projection is still what it was: not moved, cast, loaded or written to, with the same adapters in
        use.

        Of what is written through `.data`, which autograd does not count, whole rows of 256 numbers and more are seen.
        """
        tensors = list(plain_tensors(projection))
        return self._marks == _marks(projection, tensors) and all(map(torch.equal, self._samples, _samples(tensors)))


def _marks(projection: nn.Module, tensors: Sequence[torch.Tensor]) -> list[tuple]:
    return adapters_of(projection) + [
        (p.data_ptr(), p.device, p.dtype, p.shape, None if p.is_inference() else p._version) for p in tensors
    ]


def _samples(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns some numbers of each parameter and buffer, in which writing through `.data` shows, as merges do it."""
    # One of each row, in other columns each time.
    return [p.detach().flatten()[:: max(p.shape[-1] - 1, 255) if p.ndim > 1 else 1] for p in tensors]


def cast_dtypes(projection: nn.Module) -> set[str | int]:
    """Returns the dtypes of the casts of a projection that are kept, which a further twin has for nothing."""
    with _lock:
        return set(_shared.get(projection, ()))


class _Buffer:
    """Memory that one call at a time may write to."""

    def __init__(self, num_bytes: int):
        # Written to now: the first use of a page may cost more than all that is copied into it later.
        self.memory = own_memory(num_bytes).zero_()
        self.lock = threading.Lock()


class Kept:
    """What one twin keeps: casts of projections, and memory of so many bytes for the gathered neurons of others. All is
    in `bag`, which refers to no module of the model, so that it may be kept as long as the model lives.

    Args:
        dtypes: projection -> the `draft_dtype` of its cast.
        num_bytes: projection -> how much memory its neurons take.
        head_inputs: returns hidden states such as the head reads, for a shortlist.
        others: what else is to be in `bag`.
    """

    def __init__(
        self,
        dtypes: Mapping[nn.Module, str],
        num_bytes: Mapping[nn.Module, int],
        head_inputs: Callable[[], torch.Tensor],
        others: Sequence[Any] = (),
    ):
        self._dtypes, self._head_inputs, self._others = dict(dtypes), head_inputs, list(others)
        self.bag: list[Any] = []
        self._is_cleared = False
        self._buffers: dict[nn.Module, _Buffer] = {}
        with _lock:
            for part, size in num_bytes.items():
                of_part = _shared.setdefault(part, WeakValueDictionary())
                self._buffers[part] = of_part[size] = of_part.get(size) or _Buffer(size)
        self.casts()  # now, and not in the first call

    def __deepcopy__(self, memo: dict) -> "Kept":
        return Kept(copy.deepcopy(self._dtypes, memo), {}, copy.deepcopy(self._head_inputs, memo))

    @torch.no_grad()
    def casts(self) -> dict[nn.Module, nn.Module]:
        """Returns the cast of each projection that is to have one, made anew where its weights are others by now."""
        casts = {}
        with _lock:
            for projection, draft_dtype in self._dtypes.items():
                if not changes(projection, draft_dtype):
                    continue
                of_projection = _shared.setdefault(projection, WeakValueDictionary())
                cast = of_projection.get(draft_dtype)
                if cast is None or not cast.is_of(projection):
                    cast = of_projection[draft_dtype] = _Cast(projection, draft_dtype, self._head_inputs)
                casts[projection] = cast
            self.bag[:] = [] if self._is_cleared else [*casts.values(), *self._buffers.values(), *self._others]
        return {projection: cast.linear for projection, cast in casts.items()}

    @contextlib.contextmanager
    def memory(self) -> Iterator[dict[nn.Module, torch.Tensor]]:
        """Yields the memory for each projection's neurons, uint8 [num_bytes], as far as no other call has it."""
        taken: dict[nn.Module, _Buffer] = {}
        with contextlib.ExitStack() as undo:
            for part, buffer in self._buffers.items():
                if buffer.lock.acquire(blocking=False):
                    undo.callback(buffer.lock.release)
                    taken[part] = buffer
            yield {part: buffer.memory for part, buffer in taken.items()}

    def clear(self) -> None:
        """Lets go of all, for good: it is freed unless another twin has it or a call is using it."""
        with _lock:
            self._is_cleared, self._buffers, self._others = True, {}, []
            self.bag.clear()
