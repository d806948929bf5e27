"""The KV-cache of a call: room for tokens to come, wider windows, and rolling back."""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, QuantizedLayer

from ..model.compat import BaseQuantizedLayer, DummyLayer
from .states import is_recurrent, restore, snapshot


_ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` that writes new states behind those it has, into room that it keeps there. The stock one copies
    all that it holds for every token, which took a quarter of a draft step.

    Layers become one for the time of a call, and `keys` and `values` stay what they are: float [batch_size, num_heads,
    length, head_dim], here views into larger tensors: what is rolled back is written over.
    """

    _key_room: torch.Tensor | None = None
    _value_room: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.get_seq_length():
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self._key_room = _append(self.keys, key_states, self._key_room)
        self.values, self._value_room = _append(self.values, value_states, self._value_room)
        return self.keys, self.values

    def reserve(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the tensors that begin with the keys and the values, and have room for so many tokens more."""
        length = self.keys.shape[-2]
        self._key_room = _room(self.keys, length + num_tokens, self._key_room)
        self._value_room = _room(self.values, length + num_tokens, self._value_room)
        self.keys, self.values = self._key_room.narrow(-2, 0, length), self._value_room.narrow(-2, 0, length)
        return self._key_room, self._value_room


def _append(
    states: torch.Tensor, new: torch.Tensor, room: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (states followed by new, the tensor that has room for more)."""
    if states.dtype != new.dtype or states.shape[:2] != new.shape[:2]:
        return torch.cat([states, new], dim=-2), None
    start, end = states.shape[-2], states.shape[-2] + new.shape[-2]
    room = _room(states, end, room)
    # By `narrow`, as indexing takes twice as long, and this comes twice a layer for every token.
    room.narrow(-2, start, end - start).copy_(new)
    return room.narrow(-2, 0, end), room


def _room(states: torch.Tensor, length: int, room: torch.Tensor | None) -> torch.Tensor:
    """Returns a tensor that begins with these states, and has room for so many tokens: `room`, if it is one."""
    # Whoever reorders or moves a cache puts other tensors there.
    is_in_room = room is not None and states.data_ptr() == room.data_ptr() and states.stride() == room.stride()
    # Nor may tensors of an inference mode be written to outside of it.
    if is_in_room and room.is_inference() == torch.is_inference_mode_enabled() and length <= room.shape[-2]:
        return room
    return room_for(states, length + _ROOM)


def room_for(states: torch.Tensor, length: int, dim: int = 2) -> torch.Tensor:
    """Returns a tensor that begins with these states, and has so many places along their tokens' dimension."""
    shape = list(states.shape)
    num_tokens, shape[dim] = shape[dim], length
    room = states.new_empty(shape)
    room.narrow(dim, 0, num_tokens).copy_(states)
    return room


def text_cache(cache: Cache) -> Cache:
    """Returns what grows with the text: of an encoder-decoder's cache that of self-attention. The other part holds the
    encoder's keys and values, which all forwards share.
    """
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


@contextlib.contextmanager
def roomy(cache: Cache) -> Iterator[None]:
    """Within the block, the cache's plain layers are [`RoomyLayer`]s; the others stay as they are, and so do those of
    an offloaded cache, of which nothing is to be kept.
    """
    layers = [
        layer for layer in cache.layers if type(layer) is DynamicLayer and not getattr(cache, "offloading", False)
    ]
    for layer in layers:
        layer.__class__ = RoomyLayer
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = DynamicLayer
            for name in ("_key_room", "_value_room"):
                layer.__dict__.pop(name, None)


def check_cache(cache: Cache) -> None:
    """Raises `ValueError` for a KV-cache from which nothing can be rolled back."""
    layer_classes = {type(layer) for layer in cache.layers} | {cache.layer_class_to_replicate or DynamicLayer}
    if any(issubclass(layer_class, (QuantizedLayer, BaseQuantizedLayer)) for layer_class in layer_classes):
        raise ValueError(
            "a draft cannot be rolled back from a quantized KV-cache: leave out cache_implementation='quantized', or "
            "call generate without a twin"
        )
    for layer_class in layer_classes:
        if not layer_class.__module__.startswith("transformers."):
            raise ValueError(
                f"the KV-cache has layers of a class of its own, {layer_class.__qualname__}, which may drop or change "
                "tokens that a rolled back draft would need again: use the default DynamicCache, or call generate "
                "without a twin"
            )


def _lengths(cache: Cache) -> list[int | None]:
    return [int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else None for layer in cache.layers]


@contextlib.contextmanager
def growing(cache: Cache, num_tokens: int) -> Iterator[None]:
    """Raises `ValueError` at the end of the block, a forward over so many tokens, unless the cache grew by them."""
    before = _lengths(cache)
    yield
    # A layer may be made in the block, and one that shares the states of another stays empty.
    for length, now in itertools.zip_longest(before, _lengths(cache), fillvalue=0):
        if now and now - length != num_tokens:
            raise ValueError(
                f"the model read {num_tokens} tokens, and its KV-cache grew by {now - length}: something, such as a "
                "hook that compresses it, drops or adds tokens, so that a draft cannot be rolled back. Take it off, or "
                "call generate without a twin"
            )


class CacheView:
    """A KV-cache as a draft sees it: the draft marks where the verified tokens end, and comes back to there."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self._lengths: list[int | None] = []
        self._states: dict = {}

    def mark(self) -> None:
        """Takes note of how many tokens each layer has seen; of one that keeps no keys and values that is not known."""
        self._lengths = _lengths(self.cache)
        self._states = {idx: snapshot(layer) for idx, layer in enumerate(self.cache.layers) if is_recurrent(layer)}

    def roll_back(self, num_tokens: int) -> None:
        """Takes back what was written since the mark: `num_tokens`, or more in some layers if a forward was
        interrupted.
        """
        for layer, length in zip(self.cache.layers, self._lengths, strict=True):
            # A crop by 0 still brings sliding windows back to their size.
            layer.crop(-num_tokens if length is None else length - int(layer.get_seq_length()))
        for idx, state in self._states.items():
            restore(self.cache.layers[idx], state)

    def keep(self, num_read: int, kept: torch.Tensor) -> None:
        """Leaves of the tokens that the last forward read only some, in this order.

        Args:
            num_read: how many it read.
            kept: long [num_kept], which of them to keep.
        """
        for layer in self.cache.layers:
            if isinstance(layer, DummyLayer):
                continue
            for name in ("keys", "values"):
                states = getattr(layer, name)
                start = states.shape[-2] - num_read
                end = start + len(kept)
                states[..., start:end, :] = states[..., start:, :].index_select(-2, kept.to(states.device))
                setattr(layer, name, states[..., :end, :])
            if layer.is_sliding:
                layer.cumulative_length -= num_read - len(kept)


@contextlib.contextmanager
def wide_windows(cache: Cache, num_tokens: int) -> Iterator[None]:
    """Within the block, sliding-window layers hand out so many states more than their window has."""
    layers = [layer for layer in cache.layers if getattr(layer, "is_sliding", False)]
    for layer in layers:
        layer.sliding_window += num_tokens
    try:
        yield
    finally:
        for layer in layers:
            layer.sliding_window -= num_tokens
