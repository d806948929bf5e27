"""What is read for a token: bytes of a model's weights, of those of its draft, and of the KV-cache."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import BatchEncoding, PreTrainedModel

from ..decode.sparse_twin import SparseTwin
from ..draft.draft import Draft
from ..model.projections import is_projection, projection_shape
from ..model.sites import MlpSite, find_other_modules
from ..weights.formats import num_bytes
from ..weights.shortlist import SHORTLIST, num_exact_bytes


def projections(draft: Draft) -> Iterable[nn.Module]:
    """Returns the projections of a draft's dense model, each once."""
    others = [getattr(*place) for place in find_other_modules(draft.model, draft.twin.sites)]
    parts = [part for site in draft.twin.sites for part in site.parts]
    return dict.fromkeys([*(module for module in others if is_projection(module)), *parts])


def draft_bytes(draft: Draft) -> float:
    """Returns the bytes of the projections that a step of a draft needs, whose neurons are chosen."""
    config = draft.config
    dtypes: dict[nn.Module, str | None] = dict.fromkeys(projections(draft))
    dtypes |= {part: config.draft_dtype for site in draft.twin.sites for part in site.parts}
    dtypes |= {module: dtype for module, dtype in draft.twin.resident.items() if module in dtypes}
    shares = dict.fromkeys(dtypes, 1.0)
    for site in draft.twin.method_sites:
        share = draft.method.num_parameters_read(site) / site.num_parameters()
        shares |= dict.fromkeys(site.parts if isinstance(site, MlpSite) else [site.module], share)
    read = sum(num_bytes(module, dtype) * shares[module] for module, dtype in dtypes.items())
    if config.draft_head == SHORTLIST:
        read += num_exact_bytes(draft.model.get_output_embeddings())
    for block in draft.method.experts:  # a step reads those of its token, in their own dtype
        read += block.num_parameters_read() * next(block.site.module.parameters()).itemsize
    return read


def num_weights(draft: Draft) -> float:
    """Returns how many weights of projections, and of the experts of one token, a step of the dense model needs."""
    of_experts = sum(block.num_parameters_routed() for block in draft.method.experts)
    return sum(math.prod(projection_shape(module)) for module in projections(draft)) + of_experts


@torch.no_grad()
def bytes_of_forwards(model: PreTrainedModel, twin: SparseTwin, prompt: BatchEncoding) -> dict[str, float]:
    """Returns the bytes of the projections that a forward of the `model` and of its `draft` behind a prompt read, and
    of the KV-cache for each token before (`cache`).
    """
    with twin.new_call() as call:
        with call.draft.observing(None):
            cache = model(**prompt, use_cache=True, return_dict=True).past_key_values
        call.draft.select()
        with call.draft.drafting():  # some methods choose for each token
            twin(prompt["input_ids"][:, -1:], past_key_values=cache, return_dict=True)
        return {
            "model": sum(num_bytes(module, None) for module in projections(call.draft))
            + sum(
                block.num_parameters_routed() * next(block.site.module.parameters()).itemsize
                for block in call.draft.method.experts
            ),
            "draft": draft_bytes(call.draft),
            "cache": sum(s.nbytes / s.shape[-2] for layer in cache.layers for s in (layer.keys, layer.values)),
        }
