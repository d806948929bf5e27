"""The states of recurrent layers, which no crop brings back: kept, put back, and brought to the accepted length."""

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..model.accelerate_hooks import execution_device, is_offloaded
from ..model.compat import DummyLayer
from ..model.observation import evaluating, uncompiled
from ..model.stock import stock_class


# How far readings that round otherwise may lie apart, relative to what they read; of 16 bits more.
_TOLERANCE, _TOLERANCE_16 = 1e-4, 5e-2
_CONTEXT, _NEW, _NUM_DRAFTED = (1, 2, 3, 4, 5), (6, 7, 8), 2  # tokens of the trial
_State = tuple[dict[int, torch.Tensor | None], dict[int, torch.Tensor | None]]


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """How a model's recurrent layers are read.

    Attributes:
        mixers: the dotted names of the modules that write a recurrent state, by layers of the KV-cache. A layer with a
            convolution alone has none, as its states can be cropped.
        is_at_once: whether these read several tokens behind a state right; else they are given one at a time.
    """

    mixers: dict[int, str]
    is_at_once: bool


# model -> how it was seen to read
_known: "WeakKeyDictionary[PreTrainedModel, Recurrence]" = WeakKeyDictionary()


def is_recurrent(layer: Any) -> bool:
    """Whether a layer of a KV-cache has states that do not grow with the tokens, beside keys and values or alone."""
    return isinstance(layer, LinearAttentionLayer)


def keeps_states(model: PreTrainedModel) -> bool:
    """Whether a model has recurrent layers that the KV-cache knows of."""
    return any(map(is_recurrent, DynamicCache(config=model.config).layers))


def snapshot(layer: LinearAttentionLayer) -> _State:
    """Returns copies of a layer's states: kernels write them in place."""
    return tuple(
        {idx: None if state is None else state.clone() for idx, state in states.items()}
        for states in (layer.conv_states, layer.recurrent_states)
    )


def restore(layer: LinearAttentionLayer, state: _State) -> None:
    """Puts a layer's states back, as they were when `state` was taken."""
    layer.conv_states, layer.recurrent_states = (
        {idx: None if kept is None else kept.clone() for idx, kept in states.items()} for states in state
    )


def stop_growing(cache: Cache) -> None:
    """Leaves recurrent layers as plain `generate` goes on with: stock assisted decoding has them keep what their
    convolution has read, and does not take that back.
    """
    for layer in filter(is_recurrent, cache.layers):
        _trim(layer)
        layer.record_past = False


def _trim(layer: LinearAttentionLayer) -> None:
    """Leaves of what a layer's convolution has read as much as it needs."""
    for idx, size in layer.conv_kernel_size.items():
        if size is not None and layer.conv_states[idx] is not None:
            layer.conv_states[idx] = layer.conv_states[idx][..., -size:].clone()


class States:
    """The recurrent states of one KV-cache while a model reads tokens of which some may be taken back.

    Args:
        model: the dense model.
        cache: of the running call.
        recurrence: how the model reads.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, recurrence: Recurrence):
        self.model, self.cache, self.recurrence = model, cache, recurrence
        self.mixers = {idx: model.get_submodule(name) for idx, name in recurrence.mixers.items()}
        self._before: dict[int, _State] = {}
        self._given: dict[int, tuple[tuple, dict]] = {}  # to each mixer
        self._after: dict[int, list[_State]] = {}  # each token, where they are given one at a time
        self._num_read = 0

    @contextlib.contextmanager
    def reading(self, num_tokens: int) -> Iterator[None]:
        """Within the block, a forward of the model over so many tokens leaves behind what `keep` needs."""
        self._before = {idx: snapshot(self.cache.layers[idx]) for idx in self.mixers}
        self._given, self._after, self._num_read = {}, {idx: [] for idx in self.mixers}, num_tokens
        mine = threading.get_ident()
        with contextlib.ExitStack() as undo:
            for idx, mixer in self.mixers.items():
                before, behind = self._hooks(idx, mine)
                undo.callback(mixer.register_forward_pre_hook(before, with_kwargs=True).remove)
                undo.callback(mixer.register_forward_hook(behind).remove)
            undo.enter_context(uncompiled(self.model))  # what was compiled has no place for a hook
            yield

    def _hooks(self, idx: int, mine: int) -> tuple[Callable, Callable]:
        """Returns what comes before and behind the forward of a mixer, in this thread."""

        def before(mixer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if threading.get_ident() != mine:
                return None
            self._given[idx] = args, kwargs
            return None if self.recurrence.is_at_once else self._slice(idx, 0, 1)

        def behind(mixer: nn.Module, _: tuple, output: Any) -> Any:
            if threading.get_ident() != mine or self.recurrence.is_at_once:
                return output
            outputs = [output]
            self._after[idx].append(snapshot(self.cache.layers[idx]))
            for start in range(1, self._num_read):
                args, kwargs = self._slice(idx, start, start + 1)
                outputs.append(mixer.forward(*args, **kwargs))
                self._after[idx].append(snapshot(self.cache.layers[idx]))
            return _joined(outputs)

        return before, behind

    def _slice(self, idx: int, start: int, end: int) -> tuple[tuple, dict]:
        """Returns what a mixer was given of some of the tokens."""
        args, kwargs = self._given[idx]
        sliced = [_sliced(value, self._num_read, start, end) for value in (*args, *kwargs.values())]
        return tuple(sliced[: len(args)]), dict(zip(kwargs, sliced[len(args) :], strict=True))

    @torch.no_grad()
    def keep(self, num_tokens: int) -> int:
        """Brings the states to the first `num_tokens` of those that were read, and returns how many of these the mixers
        read again; keys, values and convolutions are cropped already.
        """
        if num_tokens == self._num_read:
            return 0
        for idx, mixer in self.mixers.items():
            layer = self.cache.layers[idx]
            if not self.recurrence.is_at_once:
                restore(layer, self._after[idx][num_tokens - 1])
                continue
            restore(layer, self._before[idx])
            args, kwargs = self._slice(idx, 0, num_tokens)
            mixer.forward(*args, **kwargs)
            _trim(layer)
        return num_tokens if self.mixers and self.recurrence.is_at_once else 0


def _sliced(value: Any, num_tokens: int, start: int, end: int) -> Any:
    """Returns of what belongs to so many tokens, [1, num_tokens, ...], that of some; all else as it is."""
    if torch.is_tensor(value):
        is_theirs = value.ndim > 1 and value.shape[1] == num_tokens
        return value[:, start:end] if is_theirs else value
    if type(value) in (tuple, list):
        return type(value)(_sliced(part, num_tokens, start, end) for part in value)
    return value


def _joined(outputs: list) -> Any:
    """Returns the outputs of several tokens, [1, 1, ...] each, as those of one forward."""
    if torch.is_tensor(outputs[0]):
        return torch.cat(outputs, dim=1)
    if isinstance(outputs[0], tuple):
        return tuple(_joined(list(parts)) for parts in zip(*outputs, strict=True))
    return outputs[-1]


def find_recurrence(model: PreTrainedModel) -> Recurrence | None:
    """Returns how a model's recurrent states are read and taken back, by a trial of a few tokens; `None` without any.

    Raises:
        `ValueError` for a model whose states cannot be taken back.
    """
    name = type(model).__name__
    if not keeps_states(model):
        if model._is_stateful:
            raise ValueError(
                f"{name} keeps a state of its own beside the KV-cache, from which drafts cannot be rolled back: use a "
                "model with attention, or a hybrid whose states the KV-cache holds"
            )
        return None
    layers = DynamicCache(config=model.config).layers
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        raise ValueError(
            f"{name} has states and no attention at all: all that a verification would save is in its state-space "
            "layers, and stock assisted decoding knows no cache without keys and values. Use a hybrid of both"
        )
    for layer in layers:
        known = (DynamicLayer, DynamicSlidingWindowLayer, *((DummyLayer,) if DummyLayer else ()))
        if not (is_recurrent(layer) or type(layer) in known):
            raise ValueError(
                f"{name} keeps a {type(layer).__name__} beside its states, from which drafts cannot be rolled back: "
                "use a hybrid with plain attention"
            )
    if is_offloaded(model):
        raise ValueError(f"{name} keeps states, and is offloaded as well, which is not supported: load it whole")
    if model not in _known:
        try:
            with torch.no_grad(), evaluating(model), uncompiled(model):
                _known[model] = _trial(model)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            if should_reduce_batch_size(error):  # the device is full, which says nothing about states
                raise
            raise ValueError(
                f"the states of {name} cannot be taken back to an accepted length ({type(error).__name__}: {error}): "
                "generate without a twin"
            ) from error
    return _known[model]


def _trial(model: PreTrainedModel) -> Recurrence:
    mixers: dict[int, str] = {}
    cache = DynamicCache(config=model.config)
    with _noting(model, cache, mixers):
        _read(model, _CONTEXT, cache)
    kept = [states for layer in cache.layers if is_recurrent(layer) for states in snapshot(layer)]
    if all(state is None for states in kept for state in states.values()):
        raise ValueError("it keeps them outside of the KV-cache")
    right = torch.cat([_read(model, (token,), cache) for token in _NEW])
    tolerance = _TOLERANCE_16 if torch.finfo(model.dtype).bits == 16 else _TOLERANCE
    for is_at_once in (True, False):
        recurrence = Recurrence(mixers, is_at_once)
        if _distance(_read_and_taken_back(model, recurrence), right) <= tolerance:
            return recurrence
    raise ValueError("it reads several tokens otherwise than one after another")


def _read_and_taken_back(model: PreTrainedModel, recurrence: Recurrence) -> torch.Tensor:
    """Returns the logits of a draft, of a verification that keeps all tokens but the last, and of what follows."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    _read(model, _CONTEXT, cache)
    cache.crop(0)
    before = {layer: snapshot(layer) for layer in cache.layers if is_recurrent(layer)}
    drafted = [_read(model, (token,), cache) for token in _NEW[:_NUM_DRAFTED]]
    cache.crop(-_NUM_DRAFTED)
    for layer, state in before.items():
        restore(layer, state)
    states = States(model, cache, recurrence)
    with states.reading(len(_NEW)):
        at_once = _read(model, _NEW, cache)
    cache.crop(-1)
    states.keep(len(_NEW) - 1)
    # What was taken back is read again: its logits tell whether the states were right.
    return torch.cat([*drafted, at_once, _read(model, _NEW[-1:], cache)])


def _distance(found: torch.Tensor, right: torch.Tensor) -> float:
    right = torch.cat([right[:_NUM_DRAFTED], right, right[-1:]])
    return ((found - right).norm(dim=-1) / right.norm(dim=-1)).max().item()


def _read(model: PreTrainedModel, tokens: tuple[int, ...], cache: Cache) -> torch.Tensor:
    """Returns the logits of these tokens, float64 [num_tokens, vocab_size]."""
    input_ids = torch.tensor([tokens], device=execution_device(model))
    inputs = {"input_ids": input_ids % model.get_input_embeddings().weight.shape[0], "past_key_values": cache}
    if "position_ids" in inspect.signature(stock_class(model).forward).parameters:  # which Bamba counts from 0
        inputs["position_ids"] = torch.arange(len(tokens), device=input_ids.device)[None] + cache.get_seq_length()
    return model(**inputs, use_cache=True, return_dict=True).logits[0].double()


@contextlib.contextmanager
def _noting(model: PreTrainedModel, cache: Cache, mixers: dict[int, str]) -> Iterator[None]:
    """Within the block, notes which module writes the recurrent state of each layer."""
    names = {module: name for name, module in model.named_modules()}
    running: list[nn.Module] = []
    mine = threading.get_ident()

    def enter(module: nn.Module, _: tuple) -> None:
        if threading.get_ident() == mine:
            running.append(module)

    def leave(module: nn.Module, _: tuple, output: Any) -> None:
        if threading.get_ident() == mine:
            running.pop()

    def noted(idx: int, update: Callable[..., Any]) -> Callable[..., Any]:
        def update_and_note(*args: Any, **kwargs: Any) -> Any:
            mixers[idx] = names[running[-1]]
            return update(*args, **kwargs)

        return update_and_note

    with contextlib.ExitStack() as undo:
        for module in names:
            undo.callback(module.register_forward_pre_hook(enter).remove)
            undo.callback(module.register_forward_hook(leave).remove)
        for idx, layer in enumerate(cache.layers):
            if is_recurrent(layer):
                layer.update_recurrent_state = noted(idx, layer.update_recurrent_state)
                undo.callback(vars(layer).pop, "update_recurrent_state")
        yield
