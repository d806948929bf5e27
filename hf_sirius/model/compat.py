"""Where transformers 5.17 and later versions differ; to go with the support for it."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import transformers
from packaging.version import Version
from transformers import Cache, StoppingCriteriaList, cache_utils


IS_5_17 = Version(transformers.__version__) < Version("5.18")
# The layer of a KV-cache that shares the states of another one, or has none; in 5.17 there is no such layer.
DummyLayer = getattr(cache_utils, "DummyLayer", ())
# What all quantized layers of a KV-cache have in common, in later versions.
BaseQuantizedLayer = getattr(cache_utils, "BaseQuantizedLayer", ())


class SettledCriteria(StoppingCriteriaList):
    """The criteria of a call, which candidates do not meet.

    Works around transformers 5.17, whose loop asks the criteria about unverified candidates (without the scores) and
    then keeps one token less. Mended in 5.23 at the latest; to go with the support for 5.17. Drafts end at criteria by
    themselves.
    """

    def __init__(self, criteria: StoppingCriteriaList, is_verifying: Callable[[], bool]):
        super().__init__(criteria)
        self.is_verifying = is_verifying

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor | None, **kwargs) -> torch.Tensor:
        if self.is_verifying():
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return super().__call__(input_ids, scores, **kwargs)


@contextlib.contextmanager
def stepwise_windows(cache: Cache) -> Iterator[None]:
    """Lets sliding-window layers take several forwards in a row.

    Works around transformers 5.17, where such a layer, once it records its past, hands out more states than the mask
    is made for. Mended in 5.18; to go with the support for 5.17. Here it does not record meanwhile, and its states are
    set aside and put back.
    """
    layers = (
        [layer for layer in cache.layers if getattr(layer, "is_sliding", False) and layer.record_past]
        if IS_5_17
        else []
    )
    # 5.17 leaves a tensor for a length, which its updates then change in place.
    states = [(layer.keys, layer.values, int(layer.cumulative_length)) for layer in layers]
    for layer in layers:
        layer.record_past = False
    try:
        yield
    finally:
        for layer, (keys, values, length) in zip(layers, states, strict=True):
            # What follows is a crop by the number of forwards: it is to find as many states more as other layers have.
            num_written = layer.cumulative_length - length
            layer.keys = torch.nn.functional.pad(keys, (0, 0, 0, num_written))
            layer.values = torch.nn.functional.pad(values, (0, 0, 0, num_written))
            layer.record_past = True


def stop_recording(cache: Cache) -> None:
    """Leaves a cache that plain `generate` can go on with in transformers 5.17, see `stepwise_windows`."""
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            layer.record_past = False
