"""What transformers itself offers to write a model's text sooner, to be timed beside a twin."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from ..model.projections import is_projection
from ..weights.formats import changes, draft_linear, head_dtype


def rivals(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Returns options of `generate` by name, each as its users would have it: transformers' own defaults."""
    return {
        "int4 copy as assistant": {"assistant_model": int4_copy(model)},
        "prompt lookup": {"prompt_lookup_num_tokens": 10},
    }


@torch.no_grad()
def int4_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy whose projections have 4 bits (the head maybe 8), by the products that drafts have as well."""
    assistant = copy.deepcopy(model)
    for owner in list(assistant.modules()):
        for name, child in list(owner.named_children()):
            if is_projection(child) and changes(child, "int4"):
                draft_dtype = "int4"
                if child is assistant.get_output_embeddings():
                    draft_dtype = head_dtype(draft_dtype, child.weight.device)
                setattr(owner, name, draft_linear(child, draft_dtype, compute_dtype=model.dtype))
    return assistant
