"""Copies of modules that share parameters and buffers with their originals. The only place that copies modules."""

import contextlib
import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import nn

from ..model.accelerate_hooks import own_forward
from ..model.stock import stock_class


# Code of torch.compile, accelerate's hook, what is laid over the original, and its mode, which is followed by itself.
_OF_THE_ORIGINAL = frozenset((
    "_compiled_call_impl", "_dense_hook", "_hf_hook", "_old_forward", "_own_forward",
    "_update_model_kwargs_for_generation", "forward", "generate", "prepare_inputs_for_generation", "training",
))  # fmt: skip
_WITHOUT_HOOK = "_without_hook"  # stands in the class of a copy with accelerate's hook: the one that it is made of


def copy_with(
    module: nn.Module,
    replacements: Mapping[int, dict[str, nn.Module | None]],
    copies: dict[int, nn.Module],
    keeps_hooks: bool = True,
) -> nn.Module:
    """Returns the module with replacements, by the id of their owner, somewhere in it; itself where there are none.

    Args:
        copies: which were made, by the id of the original.
        keeps_hooks: whether they have accelerate's hooks.
    """
    if id(module) in copies:
        return copies[id(module)]
    children = {
        name: child and copy_with(child, replacements, copies, keeps_hooks) for name, child in module._modules.items()
    }
    if id(module) not in replacements and all(children[name] is child for name, child in module._modules.items()):
        return module
    copies[id(module)] = twin = shallow_copy(module, keeps_hooks)
    twin._modules = children
    for name, replacement in replacements.get(id(module), {}).items():
        twin.__dict__.pop(name, None)  # an activation may be a plain function
        twin._modules[name] = replacement
    return twin


def shallow_copy(module: nn.Module, keeps_hook: bool = True) -> nn.Module:
    """Returns a module of the same class over the same parameters and buffers, with hooks and submodules of its own,
    and with accelerate's hook or without it.
    """
    attributes = vars(module)
    hook = (attributes.get("_hf_hook") or attributes.get("_dense_hook")) if keeps_hook else None
    bare_class = getattr(stock_class(module), _WITHOUT_HOOK, stock_class(module))
    copy_class = bare_class if hook is None else _hooked_class(bare_class)
    twin = copy_class.__new__(copy_class)
    twin.__dict__.update({name: value.copy() for name, value in attributes.items() if _is_own_dict(name, value)})
    twin.__dict__.update(training=module.training, _compiled_call_impl=None)
    follow(twin, module)
    forward = own_forward(module)
    if forward is None and (laid_over := attributes.get("_own_forward")) is not None:  # of a copy
        forward = laid_over.__func__
    if forward is not None:
        twin.__dict__["forward" if hook is None else "_own_forward"] = types.MethodType(forward, twin)
    if hook is not None:
        twin.__dict__["_dense_hook"] = hook
    return twin


def follow(twin: nn.Module, module: nn.Module) -> None:
    """Gives a copy the attributes of its original, but for its mode."""
    attributes = vars(twin)
    for name, value in list(vars(module).items()):
        if attributes.get(name, module) is value:  # nearly always
            continue
        if name in _OF_THE_ORIGINAL or name in twin._modules:  # an activation that was a plain function
            continue
        if not _is_own_dict(name, value) and not _runs(value, module):
            attributes[name] = value


def _is_own_dict(name: str, value: Any) -> bool:
    """Whether a copy has a dict of its own, as of hooks. `.to()` and `load_state_dict(assign=True)` put new tensors
    into those of parameters and buffers, which must reach the twin as well.
    """
    return isinstance(value, dict) and name.startswith("_") and name not in ("_parameters", "_buffers")


def _runs(value: Any, module: nn.Module) -> bool:
    """Whether a value is a method of a module, maybe wrapped, which would lead a copy back to it."""

    def is_own(function: Any) -> bool:
        return getattr(function, "__self__", None) is module

    return callable(value) and is_own(inspect.unwrap(value, stop=is_own))


@functools.cache
def _hooked_class(module_class: type[nn.Module]) -> type[nn.Module]:
    """Returns the class of copies of a module on which accelerate has a hook. Laid over an instance, as accelerate does
    it, the hook makes a cycle, and only the garbage collector frees the twin.
    """

    def forward(self, *args, **kwargs):
        hook: ModelHook = self.__dict__["_dense_hook"]
        args, kwargs = hook.pre_forward(self, *args, **kwargs)
        own = self.__dict__.get("_own_forward") or functools.partial(module_class.forward, self)
        with torch.no_grad() if hook.no_grad else contextlib.nullcontext():
            output = own(*args, **kwargs)
        return hook.post_forward(self, output)

    namespace = {"forward": functools.wraps(module_class.forward)(forward)}
    namespace |= {name: getattr(module_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace[_WITHOUT_HOOK] = module_class
    return type(module_class.__name__, (module_class,), namespace)
