"""The draft step as one compiled graph."""

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from ..model.accelerate_hooks import bare_copy, is_hooked, is_loaded
from ..sparsity.base import SparsityMethod, TwinActivation
from ..weights.draft_modules import TwinModule
from ..weights.linear import has_kernel, is_bare_linear, plain_over
from .copies import follow
from .graph import Graph, GraphUser, Rooms, misfit


class CompiledStep(GraphUser):
    """One token through a twin, by a graph.

    The graph cannot ask in which call it runs, as the twin's modules do. So there is a second tree, into which the
    modules of the running draft are put before; one draft at a time has it, and others run eagerly meanwhile. Where
    accelerate has its hooks on modules, which cannot be traced, the tree has bare copies of them.

    Args:
        module: that tree; of the model's class.
        places: where it wants a module, an owner and an attribute, and what stands there in the twin: a stand-in, or a
            module with a hook of accelerate's.
        copies: each copied module of the tree with the twin's own.
        graph: maybe of an earlier twin as well.
        config: of the model.
    """

    def __init__(
        self,
        module: nn.Module,
        places: list[tuple[nn.Module, str, nn.Module]],
        copies: list[tuple[nn.Module, nn.Module]],
        graph: Graph,
        config: PreTrainedConfig,
    ):
        super().__init__(graph)
        self._module, self._places, self._copies, self._config = module, places, copies, config
        self._are_sliding = are_sliding(config)
        # What an offloaded draft holds is gone with its call.
        self._plain: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> "CompiledStep":
        return CompiledStep(*copy.deepcopy((self._module, self._places, self._copies), memo), self.graph, self._config)

    def follow_attributes(self) -> None:
        """Gives the tree's modules the attributes of the twin's."""
        for copied, own in self._copies:
            follow(copied, own)

    @contextlib.contextmanager
    def running(
        self, held: Mapping[nn.Module, nn.Module], method: SparsityMethod, device: torch.device
    ) -> Iterator[str | None]:
        """Within the block the tree has the modules that a draft holds, and what its method does there; yields why it
        does not run all the same, in words, and `None` if it does.

        Args:
            device: of the tokens.
        """
        if self.broken is not None:
            self.tell(self.broken)
            yield self.broken
            return
        if not self._lock.acquire(blocking=False):
            yield "another call of the twin uses the graph"
            return
        try:
            reason = None
            for owner, name, in_twin in self._places:
                dense = in_twin.dense if isinstance(in_twin, TwinModule | TwinActivation) else in_twin
                module = held.get(dense, dense)
                if isinstance(module, nn.Module) and is_hooked(module):
                    module = bare_copy(module)
                    if not is_loaded(module):
                        reason = "accelerate streams weights of the draft, for which draft_memory is too small"
                elif isinstance(in_twin, TwinModule) and is_bare_linear(module) and has_kernel(module):
                    module = self._plain.get(module) or self._plain.setdefault(module, plain_over(module))
                owner._modules[name] = method.in_graph(in_twin, module, device)
            if reason is not None:
                self.tell(reason)
            yield reason
        finally:
            for owner, name, _ in self._places:
                owner._modules[name] = None
            self._lock.release()

    def misfit(self, inputs: Mapping[str, Any]) -> str | None:
        """Returns why the graph does not take these inputs of a step, in words; `None` if it does."""
        return misfit(inputs, self._are_sliding)

    def __call__(self, *inputs: Any) -> torch.Tensor | None:
        """Returns what the graph makes of the inputs behind the module; `None` where it cannot be compiled."""
        return self.logits(self._module, *inputs)


def are_sliding(config: PreTrainedConfig) -> list[bool]:
    """Returns whether each layer of the KV-cache of a model has a sliding window."""
    return [getattr(layer, "is_sliding", False) for layer in DynamicCache(config=config).layers]


class CompiledChain:
    """The steps of one draft, by a compiled graph. The cache's own states and lengths stay as they are.

    Args:
        step: the graph.
        inputs: of the first step, as the model prepares them.
        num_tokens: how many steps there may be.

    Attributes:
        num_steps: how many there were.
    """

    def __init__(self, step: CompiledStep, inputs: Mapping[str, Any], num_tokens: int):
        self._step, self.num_steps = step, 0
        self._position_ids, self._rooms = inputs["position_ids"], Rooms(inputs["past_key_values"], num_tokens)

    def __call__(self, input_ids: torch.LongTensor) -> torch.Tensor | None:
        """Returns the logits behind the last of `input_ids`, [1, vocab_size], as [`CompiledStep`] does."""
        seen = self._rooms.seen(self.num_steps)
        logits = self._step(input_ids[0, -1].view(1, 1), self._position_ids + self.num_steps, None, *seen)
        self.num_steps += 1
        return None if logits is None else logits[:, -1]
