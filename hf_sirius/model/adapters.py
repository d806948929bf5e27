"""What PEFT has laid around a model and its layers."""

import copy
import sys
from typing import Any

from torch import nn


def base_of_adapters(model: Any) -> Any:
    """Returns the transformers model within a `PeftModel`; any other one as it is."""
    peft = sys.modules.get("peft")  # of which there is no model before it is imported
    if peft is not None and isinstance(model, peft.PeftMixedModel):
        return model.base_model.model
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def is_adapted(module: nn.Module) -> bool:
    """Whether a module holds a layer, as its `base_layer`, and what adapts it."""
    return isinstance(module._modules.get("base_layer"), nn.Module)


def base_layer(module: nn.Module) -> nn.Module:
    """Returns the layer under all that adapts it; any other module as it is."""
    while is_adapted(module):
        module = module.base_layer
    return module


def adapters_of(module: nn.Module) -> list[tuple]:
    """Returns what decides, beside its weights, what an adapted layer computes: which of its adapters do so, and how
    much. Of any other module nothing.
    """
    states = []
    while is_adapted(module):
        names = (module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters))
        states.append((*names, tuple(getattr(module, "scaling", {}).items())))
        module = module.base_layer
    return states


def combined(module: nn.Module) -> nn.Module:
    """Returns one layer that computes what a layer and its adapters do by now, by PEFT's own merge of a copy; any other
    module as it is.
    """
    if not is_adapted(module):
        return module
    if not any(active for off, active, *_ in adapters_of(module) if not off) and not _is_merged(module):
        return base_layer(module)
    copied = copy.deepcopy(module)
    _merge(copied)
    return base_layer(copied)


def _is_merged(module: nn.Module) -> bool:
    return any(merged for _, _, merged, _ in adapters_of(module))


def _merge(module: nn.Module) -> None:
    """Merges what is active into the layer beneath, from the inside, as that is what runs first."""
    if is_adapted(module.base_layer):
        _merge(module.base_layer)
    if module.disable_adapters:
        if module.merged:
            module.unmerge()  # as its forward does
    elif not module.merged:
        module.merge()


def adapters_in_use(model: nn.Module) -> dict[str, list[str]]:
    """Returns the names of the adapters that are active, and merged, in any layer; where they are turned off, none."""
    names: dict[str, set[str]] = {"active": set(), "merged": set()}
    for module in filter(is_adapted, model.modules()):
        names["merged"].update(getattr(module, "merged_adapters", ()))
        if not getattr(module, "disable_adapters", False):
            names["active"].update(getattr(module, "active_adapters", ()))
    return {kind: sorted(of_kind) for kind, of_kind in names.items() if of_kind}


def find_adapters(model: nn.Module) -> set[nn.Module]:
    """Returns the modules that adapt layers, with all within them."""
    return {
        inner
        for module in model.modules()
        if is_adapted(module)
        for name, child in module.named_children()
        if name != "base_layer"
        for inner in child.modules()
    }
