"""The verification, and a dense step in place of a draft, as one compiled graph."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..model.observation import is_compiled
from ..weights.linear import has_kernel, has_own_forward, is_bare_linear, plain_over
from .compiled import are_sliding
from .copies import copy_with, shallow_copy
from .graph import GraphUser, Rooms, misfit
from .tree_reading import ATTENTIONS, TreeReader


CAPTURED = ("output_attentions", "output_hidden_states", "output_router_logits")
CAPTURING_HOOK = "output_capturing_hook"  # a name within transformers, whose hook only acts where it is asked for


class CompiledVerification:
    """Forwards of a few tokens through the dense model of one call, by a graph, into the KV-cache of the call.

    They run through copies of the modules as they are when the call begins, over the same parameters, with layers in
    them whose products the kernels take. A single token has a graph of its own, and any number of more another one.

    Args:
        user: of the graph.
        model: the dense model.
    """

    def __init__(self, user: GraphUser, model: PreTrainedModel):
        self._user, self._model = user, model
        self._reason = user.broken or _not_compiled_as(model)
        self._are_sliding = are_sliding(model.config)
        self._tree = None if self._reason else _tree_of(model)

    def __call__(self, inputs: dict) -> CausalLMOutputWithPast | None:
        """Returns the outputs for a drafted chain; `None` where the graph takes no such inputs, or is none."""
        reason = self._user.broken or self._reason or self._misfit(inputs)
        if reason is not None:
            self._user.tell(reason)
            return None
        input_ids, position_ids, cache = inputs["input_ids"], inputs["position_ids"], inputs["past_key_values"]
        if not self._user.graph.compiled_for:  # both at once, so that the first call compiles all that later ones use
            for num_read in (1, 2):
                # At one position, as there may be no other one.
                tokens = (torch.cat([ids[..., :1]] * num_read, dim=-1) for ids in (input_ids, position_ids))
                if self._logits(*tokens, cache)[0] is None:
                    return None
        logits, rooms = self._logits(input_ids, position_ids, cache)
        if logits is None:
            return None
        rooms.keep(input_ids.shape[1])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _logits(
        self, input_ids: torch.LongTensor, position_ids: torch.LongTensor, cache: Cache
    ) -> tuple[torch.Tensor | None, Rooms]:
        """Returns the logits, and the rooms that hold the tokens' states; the cache does not yet."""
        num_read, masks = input_ids.shape[1], None
        if num_read > 1:
            masks = TreeReader(self._model, cache, position_ids[..., :1], None).chain_masks(num_read)
            for tensor, places in ((input_ids, 1), (position_ids, position_ids.ndim - 1)):
                torch._dynamo.maybe_mark_dynamic(tensor, places)
            for mask in masks.values() if isinstance(masks, Mapping) else (masks,):
                torch._dynamo.maybe_mark_dynamic(mask, (2, 3))
        rooms = Rooms(cache, num_read)
        return self._user.logits(self._tree, input_ids, position_ids, masks, *rooms.seen(0, num_read)), rooms

    def _misfit(self, inputs: Mapping[str, Any]) -> str | None:
        if any(inputs.get(name, getattr(self._model.config, name, False)) for name in CAPTURED):
            return "attentions or hidden states are asked for"
        return misfit(inputs, self._are_sliding)


def _not_compiled_as(model: PreTrainedModel) -> str | None:
    """Returns why a model as it is now cannot be run by a graph, in words; `None` if it can."""
    if is_compiled(model):
        return "the model itself is compiled"
    if model.training:
        return "the model is in training"
    if model.config.get_text_config()._attn_implementation not in ATTENTIONS:
        return "its attention takes no masks of the caller's"
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if has_own_forward(module) or any(getattr(hook, "__name__", "") != CAPTURING_HOOK for hook in hooks):
            return f"a hook or a forward of its own lies over a {type(module).__name__}"
    return None


def _tree_of(model: PreTrainedModel) -> nn.Module:
    """Returns the model with layers in it that take their products by a kernel, where that is faster."""
    replacements: dict[int, dict[str, nn.Module | None]] = {}
    for owner in model.modules():
        for name, child in owner._modules.items():
            if child is not None and is_bare_linear(child) and has_kernel(child):
                replacements.setdefault(id(owner), {})[name] = plain_over(child)
    tree = copy_with(model, replacements, {})
    return shallow_copy(model) if tree is model else tree
