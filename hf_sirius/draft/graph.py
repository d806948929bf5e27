"""Graphs that torch.compile makes of forwards of a few tokens, and the KV-cache as they see it."""

import logging
import time
import types
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

from .cache import RoomyLayer, room_for
from .states import is_recurrent


logger = logging.getLogger(__name__)

# What a forward may be given; of these a graph takes the tokens, their positions, and masks of several tokens.
_KNOWN = (
    "attention_mask", "cache_position", "input_ids", "logits_to_keep", "past_key_values", "position_ids", "use_cache",
    "output_attentions", "output_hidden_states", "return_dict",
)  # fmt: skip
_MORE = 2  # than a size: those of 0 and 1 are constants of a graph
_LONGEST_REASON = 500  # characters of an error


class Graph:
    """The forward of a few tokens through a module, as torch.compile makes it when it is first used: without breaks,
    for any length of the context, once for a single token and once for more. Modules and weights are inputs: it keeps
    none, and serves all that are alike.

    Args:
        what: it computes, in words.

    Attributes:
        compiled_for: the kinds of inputs for which it was used: for another one it is made anew.
        compile_seconds: what the first use of each took.
    """

    def __init__(self, what: str):
        def read(module, input_ids, position_ids, masks, seen, keys, values, are_sliding):
            end = seen.shape[0] - _MORE
            layers = [
                _SeenLayer(k, v, end, input_ids.shape[1], is_sliding)
                for k, v, is_sliding in zip(keys, values, are_sliding, strict=True)
            ]
            outputs = module(
                input_ids=input_ids, position_ids=position_ids, attention_mask=masks,
                past_key_values=Cache(layers=layers), use_cache=True,
                output_attentions=False, output_hidden_states=False, return_dict=True,
            )  # fmt: skip
            return outputs.logits

        from ..kernels.graph_pass import JoinedProductsPass  # which loads inductor

        # torch keeps compiled code with the code object, which else all graphs would share.
        own = types.FunctionType(read.__code__.replace(), read.__globals__, closure=read.__closure__)
        self._run = torch.compile(own, fullgraph=True, options={"post_grad_custom_pre_pass": JoinedProductsPass()})
        self.what = what
        self.compiled_for: set[tuple] = set()
        self.compile_seconds = 0.0

    def __call__(self, module: nn.Module, input_ids: torch.LongTensor, *inputs: Any) -> torch.Tensor:
        """Returns the logits behind each token, [1, num_tokens, vocab_size].

        Args:
            module: of the model's class.
            input_ids: long [1, num_tokens].
            position_ids: long [..., 1, num_tokens].
            masks: additive, float [1, 1, num_tokens, num_visible], by kind of layer if there are several; `None` of a
                single token, which sees all that it is given.
            seen, keys, values, are_sliding: what [`Rooms.seen`] returns.
        """
        states = inputs[3][0]
        kind = states.dtype, states.device, states.is_inference(), input_ids.shape[1] == 1
        if kind in self.compiled_for:
            return self._run(module, input_ids, *inputs)
        start, bar = time.perf_counter(), "{desc}: {elapsed}"
        of = "" if kind[-1] else " of several tokens"
        what = f"Compiling the {self.what}{of}, which may take a minute or two"
        with transformers_logging.tqdm(total=1, desc=what, bar_format=bar) as progress:
            logits = self._run(module, input_ids, *inputs)
            progress.update()
        self.compile_seconds += time.perf_counter() - start
        self.compiled_for.add(kind)
        return logits


class GraphUser:
    """What runs a graph while it can, and else says why not.

    Attributes:
        broken: why no graph can be made, in words, where that was seen.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self._told: set[str] = set()
        self.broken: str | None = None

    def __deepcopy__(self, memo: dict) -> "GraphUser":
        user = GraphUser(self.graph)
        user.broken = self.broken
        return user

    def logits(self, *inputs: Any) -> torch.Tensor | None:
        """Returns what the graph makes of its inputs; `None` where it cannot be compiled."""
        try:
            return self.graph(*inputs)
        except Exception as error:  # of many kinds: a forward that cannot be traced, a missing C++ compiler
            if should_reduce_batch_size(error):  # the device is full
                raise
            # Behind its first paragraph torch tells how to debug it.
            told = " ".join(str(error).partition("\n\n")[0].split())[:_LONGEST_REASON]
            self.broken = f"it cannot be compiled ({type(error).__name__}: {told}): mend that, and make the twin anew"
            self.tell(self.broken)
            return None

    def tell(self, reason: str) -> None:
        """Says, once for a reason, why it runs eagerly."""
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("compile_draft: the %s runs eagerly, as %s", self.graph.what, reason)


def misfit(inputs: Mapping[str, Any], are_sliding: list[bool]) -> str | None:
    """Returns why a graph does not take these inputs of a forward, in words; `None` if it does.

    Args:
        are_sliding: whether each layer of the model has a sliding window.
    """
    cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
    if cache is None:  # which Phi-3 drops once
        return "the model reads its text anew, without its KV-cache"
    others = [name for name, value in inputs.items() if value is not None and name not in _KNOWN]
    if others or inputs.get("position_ids") is None:
        return f"the model is given {', '.join(others) or 'no position_ids'}"
    if any(map(is_recurrent, cache.layers)):
        return "the model keeps states beside its KV-cache"
    are_fit = [
        type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) and layer.is_initialized for layer in cache.layers
    ]
    are_alike = [layer.is_sliding for layer in cache.layers] == are_sliding
    if not all(are_fit) or not are_alike or getattr(cache, "offloading", False):
        return "the KV-cache is not the one that generate makes for this model"
    if cache.layers[0].keys.device != inputs["input_ids"].device:
        return "the tokens lie on another device than the KV-cache"
    if mask is not None and not (torch.is_tensor(mask) and mask.ndim == 2 and mask.all()):
        return "the prompt is padded"
    if torch.is_grad_enabled() or torch.is_autocast_enabled(inputs["input_ids"].device.type):
        return "gradients or autocast are on"
    return None


class _SeenLayer(CacheLayerMixin):
    """A layer of a KV-cache, as the tokens see it that end the text of `end` tokens. It has the states that they see,
    places for their own, and without a window room behind these.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, end: int, num_read: int, is_sliding: bool):
        self.keys, self.values, self.is_sliding = keys, values, is_sliding
        self.length, self.num_read = end - num_read, num_read
        self.num_visible = keys.shape[-2] if is_sliding else end
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            room.narrow(-2, self.num_visible - self.num_read, self.num_read).copy_(states)
        return self.keys.narrow(-2, 0, self.num_visible), self.values.narrow(-2, 0, self.num_visible)

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        # Of a single token's own place, as it sees all that it is given: a mask of one column goes with any number of
        # them, and how many there are is no question for which another graph would be made.
        return 1, self.length

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class Rooms:
    """The states of a KV-cache with room for tokens to come, as a graph sees them. The cache's own states and lengths
    stay as they are, unless `keep` is called.

    Args:
        cache: of layers that [`misfit`] lets pass.
        num_tokens: how many may come.
    """

    def __init__(self, cache: Cache, num_tokens: int):
        self._layers, self.length = cache.layers, int(cache.get_seq_length())
        self._seen = torch.empty(1, dtype=torch.bool, device="cpu").expand(self.length + num_tokens + _MORE)
        self._are_sliding = tuple(bool(layer.is_sliding) for layer in cache.layers)
        # One place is never seen: without it, a view would be the whole room at last, for which another graph is made.
        self._rooms = [
            _Window(layer, num_tokens) if layer.is_sliding else layer.reserve(num_tokens + 1) for layer in cache.layers
        ]
        for room in self._rooms:
            if not isinstance(room, _Window):
                _mark_lengths(*room)

    def seen(self, num_before: int, num_read: int = 1) -> tuple:
        """Returns what the tokens see that come behind so many others of those to come: a tensor that is longer by 2
        than the text up to the last of them, of which that alone counts; the keys and the values, float [1, num_heads,
        num_places, head_dim] of each layer, of the tokens before, behind them places for their own and, without a
        window, room; and whether each layer has a window.
        """
        rooms = [room.seen(num_before, num_read) if isinstance(room, _Window) else room for room in self._rooms]
        keys, values = zip(*rooms, strict=True)
        seen = self._seen.narrow(0, 0, self.length + num_before + num_read + _MORE)
        torch._dynamo.maybe_mark_dynamic(seen, 0)
        return seen, keys, values, self._are_sliding

    def keep(self, num_tokens: int) -> None:
        """Has the cache hold the first of the tokens to come, which a graph has read."""
        for layer, room in zip(self._layers, self._rooms, strict=True):
            if isinstance(room, _Window):
                layer.update(*room.new(num_tokens))
            else:
                layer.keys, layer.values = (states.narrow(-2, 0, self.length + num_tokens) for states in room)


class _Window:
    """A copy of the states of a layer with a sliding window, with room for tokens to come."""

    def __init__(self, layer: DynamicSlidingWindowLayer, num_tokens: int):
        self.size, self.num_states = layer.sliding_window, layer.keys.shape[-2]
        # A token's states lie side by side, so that the strides of a view do not depend on the room.
        self.rooms = [
            room_for(states.transpose(1, 2), self.num_states + num_tokens, dim=1).transpose(1, 2)
            for states in (layer.keys, layer.values)
        ]

    def seen(self, num_before: int, num_read: int) -> list[torch.Tensor]:
        """Returns the keys and the values that tokens see, with places for their own at the end. Where they are
        several, a mask tells how many each sees.
        """
        end = self.num_states + num_before + num_read
        start = max(0, end - self.size) if num_read == 1 else 0
        views = [room.narrow(-2, start, end - start) for room in self.rooms]
        _mark_lengths(*views)
        return views

    def new(self, num_tokens: int) -> list[torch.Tensor]:
        """Returns the keys and the values of the first tokens to come."""
        return [room.narrow(-2, self.num_states, num_tokens) for room in self.rooms]


def _mark_lengths(*all_states: torch.Tensor) -> None:
    """Has a graph not take for a constant how many tokens these states are of, [1, num_heads, num_places, head_dim]."""
    for states in all_states:
        torch._dynamo.maybe_mark_dynamic(states, 2)
