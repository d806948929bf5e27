"""The draft step as one compiled graph, and the KV-cache as that graph sees it."""

import contextlib
import copy
import logging
import threading
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

from ..weights.draft_modules import TwinModule, TwinProjection
from ..weights.linear import has_kernel, is_bare_linear, plain_over
from .cache import RoomyLayer, room_for
from .copies import follow
from .states import is_recurrent


logger = logging.getLogger(__name__)

# What a step may be given; of these the graph takes the last token and its position.
_KNOWN = (
    "attention_mask", "cache_position", "input_ids", "logits_to_keep", "past_key_values", "position_ids", "use_cache",
    "output_attentions", "output_hidden_states", "return_dict",
)  # fmt: skip
_MORE = 2  # than a size: those of 0 and 1 are constants of a graph
_LONGEST_REASON = 500  # characters of an error


class Graph:
    """One token's forward through a module, as torch.compile makes it when it is first used: without breaks, for any
    length of the context. Modules and weights are inputs: it keeps none, and serves all that are alike.

    Attributes:
        compiled_for: the kinds of inputs for which it was used: for another one it is made anew.
        compile_seconds: what the first use of each took.
    """

    def __init__(self):
        def step(module, input_ids, position_ids, seen, keys, values, are_sliding):
            length = seen.shape[0] - _MORE
            layers = [
                _SeenLayer(k, v, length, is_sliding) for k, v, is_sliding in zip(keys, values, are_sliding, strict=True)
            ]
            outputs = module(
                input_ids=input_ids, position_ids=position_ids, past_key_values=Cache(layers=layers), use_cache=True,
                output_attentions=False, output_hidden_states=False, return_dict=True,
            )  # fmt: skip
            return outputs.logits[:, -1]

        # torch keeps compiled code with the code object, which else all graphs would share.
        own = types.FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
        self._run = torch.compile(own, fullgraph=True)
        self.compiled_for: set[tuple] = set()
        self.compile_seconds = 0.0

    def __call__(self, module: nn.Module, *inputs: Any) -> torch.Tensor:
        """Returns the logits of the token behind, [1, vocab_size].

        Args:
            module: of the model's class.
            input_ids: long [1, 1], the token.
            position_ids: long [..., 1, 1].
            seen: [length + 2], of which the length alone counts: that of the tokens before.
            keys, values: float [1, num_heads, num_places, head_dim] of each layer, of the tokens that this one sees,
                behind them a place for its own and, without a window, room.
            are_sliding: whether each layer has a sliding window.
        """
        states = inputs[3][0]
        kind = states.dtype, states.device, states.is_inference()
        if kind in self.compiled_for:
            return self._run(module, *inputs)
        start, bar = time.perf_counter(), "{desc}: {elapsed}"
        what = "Compiling the draft step, which may take a minute or two"
        with transformers_logging.tqdm(total=1, desc=what, bar_format=bar) as progress:
            logits = self._run(module, *inputs)
            progress.update()
        self.compile_seconds += time.perf_counter() - start
        self.compiled_for.add(kind)
        return logits


class CompiledStep:
    """One token through a twin, by a graph.

    The graph cannot ask in which call it runs, as the twin's modules do. So there is a second tree, into which the
    modules of the running draft are put before; one draft at a time has it, and others run eagerly meanwhile.

    Args:
        module: that tree; of the model's class.
        places: where it wants a module, an owner and an attribute, and what stands there in the twin.
        copies: each copied module of the tree with the twin's own.
        graph: maybe of an earlier twin as well.
        config: of the model.

    Attributes:
        broken: why no graph can be made, in words, where that was seen.
    """

    def __init__(
        self,
        module: nn.Module,
        places: list[tuple[nn.Module, str, TwinModule]],
        copies: list[tuple[nn.Module, nn.Module]],
        graph: Graph,
        config: PreTrainedConfig,
    ):
        self._module, self._places, self._copies = module, places, copies
        self.graph, self._config = graph, config
        self._are_sliding = [getattr(layer, "is_sliding", False) for layer in DynamicCache(config=config).layers]
        self._plain: dict[nn.Module, nn.Module] = {}
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self.broken: str | None = None

    def __deepcopy__(self, memo: dict) -> "CompiledStep":
        return CompiledStep(*copy.deepcopy((self._module, self._places, self._copies), memo), self.graph, self._config)

    def follow_attributes(self) -> None:
        """Gives the tree's modules the attributes of the twin's."""
        for copied, own in self._copies:
            follow(copied, own)

    @contextlib.contextmanager
    def running(self, held: Mapping[nn.Module, nn.Module]) -> Iterator[bool]:
        """Within the block the tree has the modules that a draft holds; yields whether it is free, and runs."""
        if self.broken is not None or not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            for owner, name, twin_module in self._places:
                module = held.get(twin_module.dense, twin_module.dense)
                if isinstance(twin_module, TwinProjection) and is_bare_linear(module) and has_kernel(module):
                    module = self._plain.get(module) or self._plain.setdefault(module, plain_over(module))
                owner._modules[name] = module
            yield True
        finally:
            for owner, name, _ in self._places:
                owner._modules[name] = None
            self._lock.release()

    def misfit(self, inputs: Mapping[str, Any]) -> str | None:
        """Returns why the graph does not take these inputs of a step, in words; `None` if it does."""
        cache, mask = inputs["past_key_values"], inputs.get("attention_mask")
        others = [name for name, value in inputs.items() if value is not None and name not in _KNOWN]
        if others or inputs.get("position_ids") is None:
            return f"the model is given {', '.join(others) or 'no position_ids'}"
        if any(map(is_recurrent, cache.layers)):
            return "the model keeps states beside its KV-cache"
        are_fit = [
            type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) and layer.is_initialized for layer in cache.layers
        ]
        are_sliding = [layer.is_sliding for layer in cache.layers]
        if not all(are_fit) or are_sliding != self._are_sliding or getattr(cache, "offloading", False):
            return "the KV-cache is not the one that generate makes for this model"
        if mask is not None and not (torch.is_tensor(mask) and mask.ndim == 2 and mask.all()):
            return "the prompt is padded"
        if torch.is_grad_enabled() or torch.is_autocast_enabled(inputs["input_ids"].device.type):
            return "gradients or autocast are on"
        return None

    def __call__(self, *inputs: Any) -> torch.Tensor | None:
        """Returns what the graph makes of the inputs behind the module; `None` where it cannot be compiled."""
        try:
            return self.graph(self._module, *inputs)
        except Exception as error:  # of many kinds: a forward that cannot be traced, a missing C++ compiler
            if should_reduce_batch_size(error):  # the device is full
                raise
            # Behind its first paragraph torch tells how to debug it.
            told = " ".join(str(error).partition("\n\n")[0].split())[:_LONGEST_REASON]
            self.broken = f"it cannot be compiled ({type(error).__name__}: {told}): mend that, and make the twin anew"
            self.tell(self.broken)
            return None

    def tell(self, reason: str) -> None:
        """Says, once for a reason, why the step runs eagerly."""
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("compile_draft: the draft step runs eagerly, as %s", reason)


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
        self._seen = torch.empty(1, dtype=torch.bool, device="cpu").expand(self._length + num_tokens + _MORE)
        self._are_sliding = tuple(bool(layer.is_sliding) for layer in cache.layers)
        # One place is never seen: without it, a view would be the whole room at last, for which another graph is made.
        self._rooms = [
            _Window(layer, num_tokens) if layer.is_sliding else layer.reserve(num_tokens + 1) for layer in cache.layers
        ]
        for room in self._rooms:
            if not isinstance(room, _Window):
                _mark_lengths(*room)

    def __call__(self, input_ids: torch.LongTensor) -> torch.Tensor | None:
        """Returns the logits behind the last of `input_ids`, as [`CompiledStep`] does."""
        rooms = [room.seen(self._num_steps) if isinstance(room, _Window) else room for room in self._rooms]
        keys, values = zip(*rooms, strict=True)
        seen = self._seen.narrow(0, 0, self._length + self._num_steps + _MORE)
        torch._dynamo.maybe_mark_dynamic(seen, 0)
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
        views = [room.narrow(-2, start, end - start) for room in self.rooms]
        _mark_lengths(*views)
        return views


def _mark_lengths(*all_states: torch.Tensor) -> None:
    """Has a graph not take for a constant how many tokens these states are of, [1, num_heads, num_places, head_dim]."""
    for states in all_states:
        torch._dynamo.maybe_mark_dynamic(states, 2)
