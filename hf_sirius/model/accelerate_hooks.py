"""What accelerate has laid over a module whose weights it streams from CPU memory or disk."""

import types
from collections.abc import Callable, Iterator

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import nn
from transformers.pytorch_utils import Conv1D


def streaming_hook(module: nn.Module) -> AlignDevicesHook | None:
    """Returns accelerate's hook that loads this module's weights for each forward, if it has one."""
    for part in _parts(module):
        if isinstance(part, AlignDevicesHook) and part.offload:
            return part
    return None


def _parts(module: nn.Module) -> tuple[ModelHook | None, ...]:
    hook = vars(module).get("_hf_hook")
    return tuple(hook.hooks) if isinstance(hook, SequentialHook) else (hook,)


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate has laid a hook over this very module."""
    return "_hf_hook" in vars(module)


def only_aligns(module: nn.Module) -> bool:
    """Whether accelerate's hook over this module does no more than bring weights and inputs to a device."""
    return all(isinstance(part, AlignDevicesHook) for part in _parts(module))


def is_loaded(module: nn.Module) -> bool:
    """Whether the tensors of this very module are there, which accelerate's hook loads for each forward."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return not any(tensor is not None and tensor.is_meta for tensor in tensors)


def streamed_weight(projection: nn.Module) -> torch.Tensor:
    """Returns the weight of a projection that accelerate streams, as [out_features, in_features]."""
    weight = streaming_hook(projection).weights_map["weight"]
    return weight.T if isinstance(projection, Conv1D) else weight


def streaming_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, AlignDevicesHook]]:
    """Yields the modules of a model whose weights accelerate streams, each with its hook."""
    for module in model.modules():
        if (hook := streaming_hook(module)) is not None:
            yield module, hook


def own_forward(module: nn.Module) -> Callable | None:
    """Returns the forward that was laid over this very module, under accelerate's if there is one, or `None`.

    Of a forward that torch.compile made it is the one that was compiled.

    Raises:
        `ValueError` if it is no method of the module, so that a copy would compute something else.
    """
    forward = vars(module).get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    if forward is None:
        return None
    if getattr(forward, "__self__", None) is not module:
        raise ValueError(
            f"a {type(module).__name__} of this model has a forward of its own ({forward!r}): it would run the dense "
            "model in the twin's place. Lay it over the module after make_sparse, or compile the model by "
            "model.compile()"
        )
    return None if forward.__func__ is type(module).forward else forward.__func__


def bare_copy(module: nn.Module) -> nn.Module:
    """Returns the same module over its present tensors, without the hooks by which accelerate takes them away."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    for name in ("_hf_hook", "forward", "_old_forward"):
        copy.__dict__.pop(name, None)
    if (forward := own_forward(module)) is not None:
        copy.__dict__["forward"] = types.MethodType(forward, copy)
    copy._parameters, copy._buffers = dict(module._parameters), dict(module._buffers)
    return copy


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate streams any weight of this model."""
    return any(True for _ in streaming_hooks(model))


def unloaded(model: nn.Module) -> Iterator[str]:
    """Yields the names of parameters on the meta device that no hook of accelerate loads."""
    loaded = set()
    for module, hook in streaming_hooks(model):
        loaded |= set(module.parameters(recurse=hook.place_submodules))
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter not in loaded:
            yield name


def execution_device(model: nn.Module) -> torch.device:
    """Returns the device that the model's first forward runs on, which `model.device` hides where it is offloaded."""
    return next((torch.device(hook.execution_device) for _, hook in streaming_hooks(model)), model.device)


def first_owner(model: nn.Module) -> nn.Module:
    """Returns the module of the first parameter, whose device `model.device` is."""
    name, _ = next(model.named_parameters())
    return model.get_submodule(name.rpartition(".")[0])
