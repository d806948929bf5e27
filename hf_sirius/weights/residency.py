"""What a draft holds beside its neurons: how much fits into `draft_memory`, and which modules it is."""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..model.accelerate_hooks import first_owner, own_forward, streaming_hook, streaming_hooks
from ..model.adapters import is_adapted
from ..model.experts import ExpertsSite
from ..model.projections import device_of, is_projection, is_router
from ..model.sites import MlpSite, find_other_modules
from ..settings.config import SiriusConfig
from ..settings.fields import memory_bytes
from ..settings.methods import method_of
from .formats import changes, gathered_shapes, head_dtype, num_bytes
from .shortlist import SHORTLIST


logger = logging.getLogger(__name__)


class Resident(NamedTuple):
    """A module of which drafts hold a copy."""

    owner: nn.Module
    name: str  # the owner's attribute
    draft_dtype: str | None  # of the copy; `None` where it is as the module; of a head also "shortlist"

    @property
    def module(self) -> nn.Module:
        return getattr(self.owner, self.name)


def find_resident(
    model: PreTrainedModel,
    sites: list[MlpSite],
    config: SiriusConfig,
    gathers: bool,
    gathered_experts: Sequence[ExpertsSite] = (),
) -> list[Resident]:
    """Returns the modules of which drafts hold copies, gathered neurons aside.

    These are the projections that `draft_dtype` casts within `draft_scope`, and of an offloaded model all else that a
    draft step passes, as far as `draft_memory` allows: norms and the like first, then projections in the model's order.
    What does not fit is streamed for each draft step.

    Args:
        gathers: whether the method gathers neurons, so that no MLP is held whole.
        gathered_experts: those of which a draft holds a part.

    Raises:
        `ValueError` if `draft_memory` is too small for any draft, with the number that it would need.
    """
    for module, hook in streaming_hooks(model):
        if hook.place_submodules and any(module.children()):
            raise ValueError(
                f"accelerate loads a {type(module).__name__} as a whole (preload_module_classes), so no part of it can "
                "stay resident: offload the model without preload_module_classes"
            )
    head = model.get_output_embeddings()

    def other(owner: nn.Module, name: str) -> Resident:
        is_cast = is_projection(getattr(owner, name)) and not is_router(owner) and config.draft_scope == "all"
        is_head = getattr(owner, name) is head
        if is_head and config.draft_head == SHORTLIST:
            return Resident(owner, name, SHORTLIST)
        if is_head and is_cast:
            return Resident(owner, name, head_dtype(config.draft_dtype, device_of(head)))
        return Resident(owner, name, config.draft_dtype if is_cast else None)

    in_part = {block.module for block in gathered_experts}
    others = [other(*place) for place in find_other_modules(model, sites) if getattr(*place) not in in_part]
    in_mlps = [Resident(*place, config.draft_dtype) for site in sites for place in site.places]
    if method_of(config).acts_on == "projections":  # within adapted layers as well
        in_mlps = [_under_adapters(place) for place in in_mlps]
    for place in (*others, *in_mlps):
        if streaming_hook(place.module) is not None:
            own_forward(place.module)  # which may not be fit for a copy
    places = sorted(others, key=lambda place: is_projection(place.module))
    places += [] if gathers else in_mlps
    streamed = [place for place in places if streaming_hook(place.module) is not None]
    first = first_owner(model)
    resident = [
        place for place in places if changes(place.module, place.draft_dtype) and streaming_hook(place.module) is None
    ]
    needed = sum(num_bytes(place.module, place.draft_dtype) for place in resident)
    if gathers:
        shapes = gathered_shapes(sites, config)
        needed += sum(num_bytes(part, config.draft_dtype, *shape) for part, shape in shapes.items())
    needed += math.ceil(sum(block.gathered_bytes(config.density) for block in gathered_experts))
    if streaming_hook(first) is not None:
        needed += _tensor_bytes(first)
    budget = None if config.draft_memory is None else memory_bytes(config.draft_memory)
    if budget is not None and budget < needed:
        raise ValueError(
            f"draft_memory={config.draft_memory!r} is too small for any draft of this model: "
            f"{'the gathered neurons (and what else every draft holds)' if gathers else 'what draft_dtype casts'} need "
            f"{needed} bytes, {needed / 2**20:.1f} MiB. Allow at least that, "
            f"{'lower the density, ' if gathers else ''}or choose a smaller draft_dtype"
        )
    num_streamed = 0
    for place in streamed:
        if place.module is first:
            continue
        size = _copy_bytes(place)
        if budget is None or needed + size <= budget:
            resident.append(place)
            needed += size
        else:
            num_streamed += sum(parameter.nbytes for parameter in place.module.parameters())
    if streamed:
        logger.info(
            f"a draft holds {needed / 2**20:.1f} MiB of weights and streams {num_streamed / 2**20:.1f} MiB per token"
        )
    return resident


def _under_adapters(place: Resident) -> Resident:
    while is_adapted(place.module):
        place = Resident(place.module, "base_layer", place.draft_dtype)
    return place


def _copy_bytes(place: Resident) -> int:
    return _tensor_bytes(place.module) if place.draft_dtype is None else num_bytes(place.module, place.draft_dtype)


def _tensor_bytes(module: nn.Module) -> int:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
