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
    "_compiled_call_impl", "_hf_hook", "_old_forward", "_own_forward", "_update_model_kwargs_for_generation", "forward",
    "generate", "prepare_inputs_for_generation", "training",
))  # fmt: skip


def copy_with(
    module: nn.Module, replacements: Mapping[int, dict[str, nn.Module | None]], copies: dict[int, nn.Module]
) -> nn.Module:
    """Returns the module with replacements, by the id of their owner, somewhere in it; itself where there are none."""
    if id(module) in copies:
        return copies[id(module)]
    children = {name: child and copy_with(child, replacements, copies) for name, child in module._modules.items()}
    if id(module) not in replacements and all(children[name] is child for name, child in module._modules.items()):
        return module
    copies[id(module)] = twin = shallow_copy(module)
    twin._modules = children
    for name, replacement in replacements.get(id(module), {}).items():
        twin.__dict__.pop(name, None)  # an activation may be a plain function
        twin._modules[name] = replacement
    return twin


def shallow_copy(module: nn.Module) -> nn.Module:
    """Returns a module of the same class over the same parameters and buffers, with hooks and submodules of its own."""
    hook = module.__dict__.get("_hf_hook")
    copy_class = stock_class(module) if hook is None else _hooked_class(stock_class(module))
    twin = copy_class.__new__(copy_class)
    twin.__dict__.update({name: value.copy() for name, value in vars(module).items() if _is_own_dict(name, value)})
    twin.__dict__.update(training=module.training, _compiled_call_impl=None)
    follow(twin, module)
    if (forward := own_forward(module)) is not None:
        twin.__dict__["forward" if hook is None else "_own_forward"] = types.MethodType(forward, twin)
    elif (laid_over := vars(module).get("_own_forward")) is not None:  # of a copy
        twin.__dict__["_own_forward"] = types.MethodType(laid_over.__func__, twin)
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
    return type(module_class.__name__, (module_class,), namespace)
