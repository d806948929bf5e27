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
from .cache import RoomyLayer


logger = logging.getLogger(__name__)

# What a step is given beside, and can do without.
_IGNORED = ("attention_mask", "cache_position", "input_ids", "logits_to_keep", "past_key_values", "use_cache")


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
        self.problem: str | None = None  # why it cannot run, in words

        def step(input_ids, position_ids, seen, keys, values, are_sliding):
            layers = [
                _SeenLayer(k[None], v[None], seen.shape[0], is_sliding)
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
        if self.problem is not None or not self._lock.acquire(blocking=False):
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
            keys, values: float [num_heads, num_visible, head_dim] of each layer, of the tokens that this one sees, and
                at the end a place for its own.
            are_sliding: whether each layer has a sliding window.
        """
        try:
            return self._step(*inputs) if self._is_warm else self._compile(*inputs)
        except Exception as error:  # of many kinds: a forward that cannot be traced, a missing C++ compiler
            if should_reduce_batch_size(error):  # the device is full
                raise
            import os; (os.environ.get("DBG") and print(str(error)[:2500]))
            self.problem = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            logger.warning("the draft step cannot be compiled, and runs eagerly (%s)", self.problem)
            return None

    def _compile(self, *inputs: Any) -> torch.Tensor:
        _, _, seen, keys, values, _ = inputs
        for lengths, dim in (([seen], 0), ([*keys, *values], 1)):
            for tensor in lengths:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        with tqdm(total=1, desc="Compiling the draft step, once", bar_format="{desc}: {elapsed}") as progress:
            logits = self._step(*inputs)
            progress.update()
        self._is_warm = True
        return logits


class _SeenLayer(CacheLayerMixin):
    """A layer of a KV-cache, as a single token sees it that comes behind `length` others."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int, is_sliding: bool):
        self.keys, self.values, self.length, self.is_sliding = keys, values, length, is_sliding
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        num_visible = self.keys.shape[-2]
        return num_visible, self.length + 1 - num_visible

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
        self._rooms = [_reserve(layer, num_tokens) for layer in cache.layers]
        self._are_sliding = tuple(bool(layer.is_sliding) for layer in cache.layers)

    def __call__(self, input_ids: torch.LongTensor) -> torch.Tensor | None:
        """Returns the logits behind the last of `input_ids`, as [`CompiledStep`] does."""
        keys, values = [], []
        for key_room, value_room, num_seen, window in self._rooms:
            end = num_seen + self._num_steps + 1
            start = max(0, end - window)
            keys.append(key_room[0].narrow(-2, start, end - start))
            values.append(value_room[0].narrow(-2, start, end - start))
        seen = self._seen.narrow(0, 0, self._length + self._num_steps)
        position_ids = self._position_ids + self._num_steps
        logits = self._step(input_ids[0, -1].view(1, 1), position_ids, seen, keys, values, self._are_sliding)
        self._num_steps += 1
        return logits


def _reserve(layer: Any, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Returns a layer's keys and values with room for tokens to come, how many they are, and how many a token sees."""
    num_states = layer.keys.shape[-2]
    if isinstance(layer, RoomyLayer):
        return *layer.reserve(num_tokens), num_states, num_states + num_tokens
    rooms = []
    for states in (layer.keys, layer.values):
        batch_size, num_heads, _, head_dim = states.shape
        room = states.new_empty(batch_size, num_states + num_tokens, num_heads, head_dim).transpose(1, 2)
        room.narrow(-2, 0, num_states).copy_(states)
        rooms.append(room)
    return *rooms, num_states, layer.sliding_window


def is_fit(inputs: Mapping[str, Any]) -> bool:
    """Whether a graph takes these inputs of a step: one sequence without padding, over a stock KV-cache."""
    others = [name for name, value in inputs.items() if value is not None and name not in (*_IGNORED, "position_ids")]
    cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
    return (
        not others
        and inputs.get("position_ids") is not None
        and inputs["input_ids"].shape == (1, 1)
        and all(type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        and (mask is None or (torch.is_tensor(mask) and mask.ndim == 2 and bool(mask.all())))
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(inputs["input_ids"].device.type)
    )
