"""What a draft holds beside its neurons: how much fits into `draft_memory`, and which modules it is."""

import logging

from torch import nn
from transformers import PreTrainedModel

from ..model.accelerate_hooks import first_owner, own_forward, streaming_hook, streaming_hooks
from ..model.sites import PROJECTIONS, MlpSite, find_other_modules
from ..settings.config import SiriusConfig, memory_bytes
from .formats import changes, gathered_shapes, num_bytes


logger = logging.getLogger(__name__)


def find_resident(
    model: PreTrainedModel, sites: list[MlpSite], config: SiriusConfig, gathers: bool
) -> list[tuple[nn.Module, str]]:
    """Returns the modules of which drafts hold copies, gathered neurons aside: (owner, attribute name) of each.

    These are the projections that `draft_dtype` casts within `draft_scope`, and of an offloaded model all else that a
    draft step passes, as far as `draft_memory` allows: norms and the like first, then projections in the model's order.
    What does not fit is streamed for each draft step.

    Args:
        gathers: whether the method gathers neurons, so that no MLP is held whole.

    Raises:
        `ValueError` if `draft_memory` is too small for any draft, with the number that it would need.
    """
    for module, hook in streaming_hooks(model):
        if hook.place_submodules and any(module.children()):
            raise ValueError(
                f"accelerate loads a {type(module).__name__} as a whole (preload_module_classes), so no part of it can "
                "stay resident: offload the model without preload_module_classes"
            )
    others = find_other_modules(model, sites)
    in_mlps = [(site.owner, name) for site in sites for name in site.part_names]
    for place in (*others, *in_mlps):
        if streaming_hook(getattr(*place)) is not None:
            own_forward(getattr(*place))  # which may not be fit for a copy
    projections = [place for place in others if isinstance(getattr(*place), PROJECTIONS)]
    norms = [place for place in others if not isinstance(getattr(*place), PROJECTIONS)]
    streamed = [place for place in (*norms, *projections) if streaming_hook(getattr(*place)) is not None]
    first = first_owner(model)
    resident = [
        place
        for place in (*(projections if config.draft_scope == "all" else ()), *(() if gathers else in_mlps))
        if changes(getattr(*place), config.draft_dtype) and streaming_hook(getattr(*place)) is None
    ]
    needed = sum(num_bytes(getattr(*place), config.draft_dtype) for place in resident)
    if gathers:
        shapes = gathered_shapes(sites, config)
        needed += sum(num_bytes(part, config.draft_dtype, *shape) for part, shape in shapes.items())
    if streaming_hook(first) is not None:
        needed += _copy_bytes(first, config)
    budget = None if config.draft_memory is None else memory_bytes(config.draft_memory)
    if budget is not None and budget < needed:
        raise ValueError(
            f"draft_memory={config.draft_memory!r} is too small for any draft of this model: "
            f"{'the gathered neurons (and what else every draft holds)' if gathers else 'what draft_dtype casts'} need "
            f"{needed} bytes, {needed / 2**20:.1f} MiB. Allow at least that, "
            f"{'lower the density, ' if gathers else ''}or choose a smaller draft_dtype"
        )
    num_streamed = 0
    for owner, name in streamed:
        module = getattr(owner, name)
        if module is first:
            continue
        size = _copy_bytes(module, config)
        if budget is None or needed + size <= budget:
            resident.append((owner, name))
            needed += size
        else:
            num_streamed += sum(parameter.nbytes for parameter in module.parameters())
    if streamed:
        logger.info(
            f"a draft holds {needed / 2**20:.1f} MiB of weights and streams {num_streamed / 2**20:.1f} MiB per token"
        )
    return resident


def _copy_bytes(module: nn.Module, config: SiriusConfig) -> int:
    if isinstance(module, PROJECTIONS) and config.draft_scope == "all":
        return num_bytes(module, config.draft_dtype)
    tensors = (*module._parameters.values(), *module._buffers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
