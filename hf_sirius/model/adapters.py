"""What PEFT has laid around a model and its layers."""

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
