"""What a draft holds beside its neurons: how much fits into `draft_memory`, and which modules it is."""

import logging

from torch import nn
from transformers import PreTrainedModel

from .config import SiriusConfig, memory_bytes
from .mlp import PROJECTIONS, MlpSite, find_other_projections, projection_shape
from .quantization import OWN_MEMORY, changes, num_bytes, num_kept_neurons
from .sparsity import method_class
from .streaming import first_owner, own_forward, streaming_hook


logger = logging.getLogger(__name__)


def find_held(model: PreTrainedModel, sites: list[MlpSite], config: SiriusConfig) -> list[tuple[nn.Module, str]]:
    """Returns the modules outside the MLPs of which drafts hold copies: (owner, attribute name) of each.

    These are the projections that `draft_scope` casts, and of an offloaded model all else that a draft step passes, as
    far as `draft_memory` allows: norms and the like first, then projections in the model's order. What does not fit is
    streamed for each draft step.

    Raises:
        `ValueError` if `draft_memory` is too small for any draft, with the number that it would need.
    """
    projections = find_other_projections(model, sites)
    streamed = _streamed_modules(model, sites, {id(getattr(*place)) for place in projections})
    first = first_owner(model)
    resident = [
        place
        for place in projections
        if config.draft_scope == "all"
        and changes(getattr(*place), config.draft_dtype)
        and streaming_hook(getattr(*place)) is None
    ]
    for module in (*(getattr(*place) for place in streamed), *(part for site in sites for part in site.parts)):
        if streaming_hook(module) is not None:
            own_forward(module)  # which may not be fit for a copy
    needed = sum(sum(neuron_bytes(site, config).values()) for site in sites)
    needed += sum(_copy_bytes(getattr(*place), config) for place in resident)
    if streaming_hook(first) is not None:
        needed += _copy_bytes(first, config)
    budget = None if config.draft_memory is None else memory_bytes(config.draft_memory)
    if budget is not None and budget < needed:
        raise ValueError(
            f"draft_memory={config.draft_memory!r} is too small for any draft of this model: the gathered neurons "
            f"(and what else every draft holds) need {needed} bytes, {needed / 2**20:.1f} MiB. Allow at least that, "
            "lower the density, or choose a smaller draft_dtype"
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
            num_streamed += sum(p.numel() * p.element_size() for p in module.parameters())
    if streamed:
        logger.info(
            f"a draft holds {needed / 2**20:.1f} MiB of weights and streams {num_streamed / 2**20:.1f} MiB per token"
        )
    return resident


def _streamed_modules(model, sites: list[MlpSite], projection_ids: set[int]) -> list[tuple[nn.Module, str]]:
    in_mlps = {part for site in sites for part in site.parts}
    decoder = set(model.get_decoder().modules())
    head = model.get_output_embeddings()
    places = [
        (owner, name)
        for owner in model.modules()
        for name, child in owner.named_children()
        if streaming_hook(child) is not None and child not in in_mlps and (child in decoder or child is head)
    ]
    for module in model.modules():
        if (hook := streaming_hook(module)) is not None and hook.place_submodules and any(module.children()):
            raise ValueError(
                f"accelerate loads a {type(module).__name__} as a whole (preload_module_classes), so no part of it can "
                "stay resident: offload the model without preload_module_classes"
            )
    return sorted(places, key=lambda place: id(getattr(*place)) in projection_ids)


def _copy_bytes(module: nn.Module, config: SiriusConfig) -> int:
    if isinstance(module, PROJECTIONS) and config.draft_scope == "all":
        return num_bytes(module, config.draft_dtype)
    tensors = (*module._parameters.values(), *module._buffers.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def neuron_bytes(site: MlpSite, config: SiriusConfig) -> dict[nn.Module, int]:
    """Returns how many bytes the gathered neurons of each projection of an MLP take; none of what is not gathered."""
    num_kept = num_kept_neurons(config.density, site.num_neurons, config.draft_dtype)
    sizes = {}
    for part in site.parts:
        as_it_is = num_kept == site.num_neurons and not changes(part, config.draft_dtype)
        if as_it_is and streaming_hook(part) is None:
            continue
        if part is site.down:
            sizes[part] = num_bytes(part, config.draft_dtype, num_columns=num_kept)
        else:
            num_rows = projection_shape(part)[0] // site.num_neurons * num_kept
            sizes[part] = num_bytes(part, config.draft_dtype, num_rows=num_rows)
    return sizes


def kept_neuron_bytes(sites: list[MlpSite], config: SiriusConfig) -> dict[nn.Module, int]:
    """Returns how much memory the twin keeps for the neurons of each projection: large ones on a CPU. (Elsewhere torch
    keeps what it allocates anyway, and offloaded weights are gathered while they pass.)
    """
    if not method_class(config.method).gathers:
        return {}
    return {
        part: size
        for site in sites
        for part, size in neuron_bytes(site, config).items()
        if part.weight.device.type == "cpu" and streaming_hook(part) is None and size >= OWN_MEMORY
    }
