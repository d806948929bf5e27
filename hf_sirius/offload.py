"""Drafts for a model whose weights accelerate streams from CPU memory or disk: what stays resident, and how it gets
there.

The draft's copies are taken while the prefill streams the weights past, layer by layer, so no extra pass is needed. The
verification goes through accelerate's own hooks, once per cycle.
"""

import contextlib
import functools
import math
import os
import types
from collections.abc import Callable, Iterator, Mapping

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .config import SiriusConfig, memory_bytes
from .mlp import PROJECTIONS, MlpSite, find_other_projections, projection_shape
from .quantization import changes, narrowed, num_bytes, num_kept_neurons
from .sparsity.base import SparsityMethod


logger = logging.get_logger(__name__)


def streaming_hook(module: nn.Module) -> AlignDevicesHook | None:
    """Returns accelerate's hook that loads this module's weights for each forward, if it has one."""
    hook = getattr(module, "_hf_hook", None)
    for part in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(part, AlignDevicesHook) and part.offload:
            return part
    return None


def own_forward(module: nn.Module) -> Callable | None:
    """Returns the forward that was laid over this very module, under accelerate's if there is one, or `None`.

    Raises:
        `ValueError` if it is no method of the module, so that a copy would compute something else.
    """
    forward = vars(module).get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    if forward is None:
        return None
    if getattr(forward, "__self__", None) is not module:
        raise ValueError(
            f"a {type(module).__name__} of this model has a forward of its own ({forward!r}), such as torch.compile "
            "makes: it would run the dense model in the twin's place. Call make_sparse first and compile afterwards."
        )
    return None if forward.__func__ is type(module).forward else forward.__func__


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate streams any weight of this model."""
    return any(streaming_hook(module) is not None for module in model.modules())


def execution_device(model: nn.Module) -> torch.device:
    """Returns the device that the model's first forward runs on, which `model.device` hides where it is offloaded."""
    for module in model.modules():
        if (hook := streaming_hook(module)) is not None:
            return torch.device(hook.execution_device)
    return model.device


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
    first = _first_owner(model)
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
    needed = sum(_neuron_bytes(site, config) for site in sites)
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


def _first_owner(model: nn.Module) -> nn.Module:
    name, _ = next(model.named_parameters())
    return model.get_submodule(name.rpartition(".")[0])


def _copy_bytes(module: nn.Module, config: SiriusConfig) -> int:
    if isinstance(module, PROJECTIONS) and config.draft_scope == "all":
        return num_bytes(module, config.draft_dtype)
    tensors = (*module._parameters.values(), *module._buffers.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _neuron_bytes(site: MlpSite, config: SiriusConfig) -> int:
    num_kept = num_kept_neurons(config.density, site.num_neurons, config.draft_dtype)
    total = 0
    for part in site.parts:
        as_it_is = num_kept == site.num_neurons and not changes(part, config.draft_dtype)
        if as_it_is and streaming_hook(part) is None:
            continue
        if part is site.down:
            total += num_bytes(part, config.draft_dtype, num_columns=num_kept)
        else:
            num_rows = projection_shape(part)[0] // site.num_neurons * num_kept
            total += num_bytes(part, config.draft_dtype, num_rows=num_rows)
    return total


def check_offload(model: nn.Module) -> None:
    """Raises `FileNotFoundError` or `ValueError` if weights that accelerate would read from disk are not there."""
    for module in model.modules():
        if (hook := streaming_hook(module)) is None:
            continue
        for name in module._parameters:
            key, source = _source(hook.weights_map, name)
            if not isinstance(source, OffloadedWeightsLoader) or key in source.state_dict or key not in source.index:
                continue
            info = source.index[key]
            file = info.get("safetensors_file") or os.path.join(source.save_folder, f"{key}.dat")
            if not os.path.isfile(file):
                raise FileNotFoundError(
                    f"{file} is gone, from which accelerate was to read the offloaded weight {key!r}: load and offload "
                    "the model anew, and keep its offload folder while it is used"
                )
            parameter = module._parameters[name]
            if "safetensors_file" not in info and os.path.getsize(file) < parameter.numel() * parameter.element_size():
                raise ValueError(
                    f"{file} is cut short (was the disk full?): free space and offload the model anew into an empty "
                    "folder"
                )


def _source(weights: Mapping, name: str) -> tuple[str, Mapping]:
    """Returns the key of a hook's weight and the collection that it is of, behind accelerate's prefixed views."""
    while isinstance(weights, PrefixedDataset):
        name, weights = weights.prefix + name, weights.dataset
    return name, weights


class _MappedWeights(Mapping):
    """What stands in for the `state_dict` of accelerate's loader: weights that *are* the pages of their files.

    The loader itself copies each weight out of its mapped file, and so has it in memory twice.
    """

    def __init__(self, loader: OffloadedWeightsLoader):
        self.in_memory, self.folder = loader.state_dict, loader.save_folder
        self.on_disk = {key: info for key, info in loader.index.items() if not info.get("safetensors_file")}

    def __getitem__(self, key: str) -> torch.Tensor:
        if key in self.in_memory:
            return self.in_memory[key]
        info = self.on_disk[key]
        file, size = os.path.join(self.folder, f"{key}.dat"), math.prod(info["shape"])
        # Not shared: what is written to the weight does not reach the file.
        return torch.from_file(file, size=size, dtype=getattr(torch, info["dtype"])).view(info["shape"])

    def __contains__(self, key: object) -> bool:  # without a mapping, which the base would make
        return key in self.in_memory or key in self.on_disk

    def __iter__(self) -> Iterator[str]:
        return iter({**self.in_memory, **self.on_disk})

    def __len__(self) -> int:
        return len({**self.in_memory, **self.on_disk})


@contextlib.contextmanager
def _mapping(model: nn.Module) -> Iterator[None]:
    hooks = [hook for module in model.modules() if (hook := streaming_hook(module)) is not None]
    loaders = {id(source): source for hook in hooks for _, source in [_source(hook.weights_map, "")]}
    with contextlib.ExitStack() as undo:
        for loader in loaders.values():
            if isinstance(loader, OffloadedWeightsLoader):
                undo.callback(setattr, loader, "state_dict", loader.state_dict)
                loader.state_dict = _MappedWeights(loader)
        yield


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Within the block, weights on disk are not copied out of their files, and the first parameter of an offloaded
    model stays loaded; after it no weight is.

    Stock assisted decoding sends the candidates to `model.device`, the first parameter's. A forward that was
    interrupted leaves the weights of one module behind.
    """
    owner = _first_owner(model)
    hook = streaming_hook(owner)
    undo = contextlib.ExitStack()
    try:
        undo.enter_context(_mapping(model))
        if hook is not None:
            hook.pre_forward(owner)
            # Accelerate finds tied weights by their address, which will be another weight's before the call ends.
            for pointer, device in hook.tied_pointers_to_remove:
                hook.tied_params_map[pointer].pop(device, None)
            hook.tied_pointers_to_remove = set()
            hook.offload = False
        yield
    finally:
        undo.close()
        if hook is not None:
            hook.offload = True
        for module in model.modules():
            left = streaming_hook(module)
            if left is not None and any(p is not None and not p.is_meta for p in module._parameters.values()):
                left.post_forward(module, None)


@contextlib.contextmanager
def taking(method: SparsityMethod, sites: list[MlpSite], others: list[nn.Module]) -> Iterator[None]:
    """Within the block, the draft takes its copies from the weights that accelerate loads for the dense forwards."""
    waiting: dict[nn.Module, nn.Module] = {}

    def narrow(*_) -> None:
        # Until the MLP's neurons are known, which is when its down projection runs. The weight loaded last stays as it
        # is until then.
        for loaded in waiting.values():
            weight = narrowed(loaded.weight.detach(), method.config.draft_dtype)
            loaded._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def choose(site: MlpSite) -> None:
        method.choose(site)
        for part in site.parts:
            if (loaded := waiting.pop(part, None)) is not None:
                method.gather(site, part, loaded)

    with contextlib.ExitStack() as undo:
        for module in others:
            if streaming_hook(module) is not None and module not in method.held:
                undo.enter_context(_on_load(module, lambda loaded, module=module: method.hold(module, loaded)))
        for site in sites:
            for part in site.parts:
                if part is not site.down and streaming_hook(part) is not None:
                    undo.callback(part.register_forward_pre_hook(narrow).remove)
                    undo.enter_context(_on_load(part, functools.partial(waiting.__setitem__, part)))
            # After the observer's own hook, and before down's weights are loaded.
            undo.callback(site.down.register_forward_pre_hook(lambda *_, site=site: choose(site)).remove)
            if streaming_hook(site.down) is not None:
                undo.enter_context(
                    _on_load(site.down, lambda loaded, site=site: method.gather(site, site.down, loaded))
                )
        yield


@contextlib.contextmanager
def _on_load(module: nn.Module, take: Callable[[nn.Module], None]) -> Iterator[None]:
    """Within the block, hands a copy of the module to `take` whenever accelerate has loaded its weights."""
    hook = module._hf_hook
    load, outer = hook.pre_forward, vars(hook).get("pre_forward")

    def pre_forward(module, *args, **kwargs):
        inputs = load(module, *args, **kwargs)
        take(_loaded_copy(module))
        return inputs

    hook.pre_forward = pre_forward
    try:
        yield
    finally:
        del hook.pre_forward
        if outer is not None:
            hook.pre_forward = outer


def _loaded_copy(module: nn.Module) -> nn.Module:
    """Returns the same module over its present weights, which accelerate's hook does not take away again."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    for name in ("_hf_hook", "forward", "_old_forward"):
        copy.__dict__.pop(name, None)
    if (forward := own_forward(module)) is not None:
        copy.forward = types.MethodType(forward, copy)
    copy._parameters, copy._buffers = dict(module._parameters), dict(module._buffers)
    return copy
