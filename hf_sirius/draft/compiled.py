"""The draft step as one compiled graph, and the KV-cache as that graph sees it."""

import contextlib
import logging
import threading
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from tqdm import tqdm
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from ..weights.draft_modules import TwinModule, TwinProjection
from ..weights.linear import has_kernel, plain_over
from .cache import RoomyLayer, room_for


logger = logging.getLogger(__name__)

# What a step may be given; of these the graph takes the last token and its position.
_KNOWN = (
    "attention_mask", "cache_position", "input_ids", "logits_to_keep", "past_key_values", "position_ids", "use_cache",
)  # fmt: skip
_LONGEST_REASON = 500  # characters of an error


class CompiledStep:
    """One token through a twin, as torch.compile makes it: a graph without breaks, for any length of the context.

    The graph cannot ask in which call it runs, as the twin's modules do. It has a tree of its own, into which the
    modules of the running draft are put before; one draft at a time has it, and others run eagerly meanwhile.

    Args:
        module: that tree; of the model's class.
        places: where it wants a module, an owner and an attribute, and what stands there in the twin.
        dense_modules: of the model, itself aside, whose places they are.
    """

    def __init__(
        self, module: nn.Module, places: list[tuple[nn.Module, str, TwinModule]], dense_modules: list[nn.Module]
    ):
        self.dense_modules = dense_modules
        self._places = places
        self._plain: dict[nn.Module, nn.Module] = {}
        self._lock = threading.Lock()
        self._is_warm = False
        self._is_broken = False
        self.reason: str | None = None  # why drafts ran eagerly at last, in words

        def step(input_ids, position_ids, seen, keys, values, are_sliding):
            layers = [
                _SeenLayer(k, v, seen.shape[0], is_sliding)
                for k, v, is_sliding in zip(keys, values, are_sliding, strict=True)
            ]
            outputs = module(
                input_ids=input_ids, position_ids=position_ids, past_key_values=Cache(layers=layers), use_cache=True,
                output_attentions=False, output_hidden_states=False, return_dict=True,
            )  # fmt: skip
            return outputs.logits[:, -1]

        # torch keeps compiled code with the code object, which all closures of a function share.
        own = types.FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
        self._step = torch.compile(own, fullgraph=True)

    @contextlib.contextmanager
    def running(self, held: Mapping[nn.Module, nn.Module]) -> Iterator[bool]:
        """Within the block the graph has the modules that a draft holds; yields whether it is free, and runs."""
        if self._is_broken or not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            for owner, name, twin_module in self._places:
                owner._modules[name] = self._module(twin_module, held)
            yield True
        finally:
            for owner, name, _ in self._places:
                owner._modules[name] = None
            self._lock.release()

    def _module(self, twin_module: TwinModule, held: Mapping[nn.Module, nn.Module]) -> nn.Module:
        dense = twin_module.dense
        module = held.get(dense, dense)
        if not isinstance(twin_module, TwinProjection) or type(module) is not nn.Linear or not has_kernel(module):
            return module
        if module not in self._plain:
            self._plain[module] = plain_over(module)
        return self._plain[module]

    def __call__(self, *inputs: Any) -> torch.Tensor | None:
        """Returns the logits of the token behind, [1, vocab_size]; `None` where the graph cannot be compiled, which is
        told once.

        Args:
            input_ids: long [1, 1], the token.
            position_ids: long [..., 1, 1].
            seen: [length], of which the length alone counts: the tokens before.
            keys, values: float [1, num_heads, num_places, head_dim] of each layer, of the tokens that this one sees,
                behind them a place for its own and, without a window, room.
            are_sliding: whether each layer has a sliding window.
        """
        try:
            return self._step(*inputs) if self._is_warm else self._compile(*inputs)
        except Exception as error:  # of many kinds: a forward that cannot be traced, a missing C++ compiler
            if should_reduce_batch_size(error):  # the device is full
                raise
            self._is_broken = True
            self.tell(f"{type(error).__name__}: {str(error).strip()[:_LONGEST_REASON]}")
            return None

    def tell(self, reason: str) -> None:
        """Says, once, that drafts run eagerly."""
        if self.reason is None:
            logger.warning("compile_draft has no effect here, drafts run eagerly: %s", reason)
        self.reason = reason

    def _compile(self, *inputs: Any) -> torch.Tensor:
        _, _, seen, keys, values, _ = inputs
        for lengths, dim in (([seen], 0), ([*keys, *values], 2)):
            for tensor in lengths:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        with tqdm(total=1, desc="Compiling the draft step, once", bar_format="{desc}: {elapsed}") as progress:
            logits = self._step(*inputs)
            progress.update()
        self._is_warm = True
        return logits


class _SeenLayer(CacheLayerMixin):
    """A layer of a KV-cache, as a single token sees it that comes behind `length` others. It has the states that the
    token sees, a place for the token's own, and without a window room behind it.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int, is_sliding: bool):
        self.keys, self.values, self.length, self.is_sliding = keys, values, length, is_sliding
        self.num_visible = keys.shape[-2] if is_sliding else length + 1
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            room.narrow(-2, self.num_visible - 1, 1).copy_(states)
        return self.keys.narrow(-2, 0, self.num_visible), self.values.narrow(-2, 0, self.num_visible)

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        # Of the token's own place, as it sees all that it is given: a mask of one column goes with any number of them,
        # and how many there are is no question for which another graph would be made.
        return 1, self.length

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class CompiledChain:
    """The steps of one draft, by a compiled graph. The cache's own states and lengths stay as they are.

    Args:
        step: the graph.
        inputs: of the first step, as the model prepares them.
        num_tokens: how many steps there may be.
    """

    def __init__(self, step: CompiledStep, inputs: Mapping[str, Any], num_tokens: int):
        cache = inputs["past_key_values"]
        self._step, self._num_steps = step, 0
        self._length, self._position_ids = int(cache.get_seq_length()), inputs["position_ids"]
        self._seen = torch.empty(1, dtype=torch.bool, device="cpu").expand(self._length + num_tokens)
        self._are_sliding = tuple(bool(layer.is_sliding) for layer in cache.layers)
        # One place is never seen: without it, a view would be the whole room at last, for which another graph is made.
        self._rooms = [
            _Window(layer, num_tokens) if layer.is_sliding else layer.reserve(num_tokens + 1) for layer in cache.layers
        ]

    def __call__(self, input_ids: torch.LongTensor) -> torch.Tensor | None:
        """Returns the logits behind the last of `input_ids`, as [`CompiledStep`] does."""
        rooms = [room.seen(self._num_steps) if isinstance(room, _Window) else room for room in self._rooms]
        keys, values = zip(*rooms, strict=True)
        seen = self._seen.narrow(0, 0, self._length + self._num_steps)
        position_ids = self._position_ids + self._num_steps
        logits = self._step(input_ids[0, -1].view(1, 1), position_ids, seen, keys, values, self._are_sliding)
        self._num_steps += 1
        return logits


class _Window:
    """A copy of the states of a layer with a sliding window, with room for a draft."""

    def __init__(self, layer: DynamicSlidingWindowLayer, num_tokens: int):
        self.size, self.num_states = layer.sliding_window, layer.keys.shape[-2]
        # A token's states lie side by side, so that the strides of a view do not depend on the room.
        self.rooms = [
            room_for(states.transpose(1, 2), self.num_states + num_tokens, dim=1).transpose(1, 2)
            for states in (layer.keys, layer.values)
        ]

    def seen(self, num_steps: int) -> list[torch.Tensor]:
        """Returns the keys and the values that the token of a step sees, with a place for its own at the end."""
        end = self.num_states + num_steps + 1
        start = max(0, end - self.size)
        return [room.narrow(-2, start, end - start) for room in self.rooms]


def misfit(inputs: Mapping[str, Any]) -> str | None:
    """Returns why a graph does not take these inputs of a step, in words; `None` if it does."""
    cache, mask = inputs["past_key_values"], inputs.get("attention_mask")
    others = [name for name, value in inputs.items() if value is not None and name not in _KNOWN]
    if others or inputs.get("position_ids") is None:
        return f"the model takes {', '.join(others) or 'no position_ids'}"
    if wrong := {type(layer) for layer in cache.layers} - {RoomyLayer, DynamicSlidingWindowLayer}:
        return f"the KV-cache has layers of type {', '.join(sorted(layer.__name__ for layer in wrong))}"
    if mask is not None and not (torch.is_tensor(mask) and mask.ndim == 2 and mask.all()):
        return "the prompt is padded"
    if torch.is_grad_enabled() or torch.is_autocast_enabled(inputs["input_ids"].device.type):
        return "gradients or autocast are on"
    return None
