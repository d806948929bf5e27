"""Drafts of a model whose weights accelerate streams from CPU memory or disk: they take their copies while the prefill
streams the weights past, so no extra pass is needed. The verification goes through accelerate's own hooks.
"""

import contextlib
import functools
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
from accelerate import disk_offload
from accelerate.hooks import ModelHook
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from torch import nn
from transformers import PreTrainedModel

from ..model.accelerate_hooks import bare_copy, first_owner, streaming_hook, streaming_hooks
from ..model.sites import MlpSite
from .formats import narrowed
from .memory import trim_heap


_lock = threading.Lock()
# In which thread an offloaded model generates.
_threads: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def offload_to_folder(model: PreTrainedModel, folder: str | os.PathLike, device: str) -> None:
    """Offloads a model to an empty folder. Raises `ValueError` if it is not empty, `OSError` if the disk is too full.

    accelerate reuses what it finds in a folder, and writes through a memory map, which ends the process on a full disk.
    """
    check_is_empty(folder)
    os.makedirs(folder, exist_ok=True)
    needed = sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the offload folder {str(folder)!r} has {free / 2**30:.1f} GiB free, but the weights take "
            f"{needed / 2**30:.1f} GiB: free some space, or name a folder on another disk"
        )
    disk_offload(model, folder, execution_device=torch.device(device))


def check_is_empty(folder: str | os.PathLike) -> None:
    """Raises `ValueError` if a folder to offload to holds anything, `NotADirectoryError` if it is a file."""
    if os.path.exists(folder) and os.listdir(folder):
        raise ValueError(f"the offload folder {str(folder)!r} is not empty: name another one, or empty it")


def check_offload(model: nn.Module) -> None:
    """Raises `FileNotFoundError` or `ValueError` if weights that accelerate would read from disk are not there."""
    for module, hook in streaming_hooks(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
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
            if "safetensors_file" not in info and os.path.getsize(file) < tensor.nbytes:
                raise ValueError(
                    f"{file} is cut short (was the disk full?): free space and offload the model anew into an empty "
                    "folder"
                )


def _source(weights: Mapping, name: str) -> tuple[str, Mapping]:
    """Returns the key of a hook's weight and the collection that it is of, behind accelerate's prefixed views."""
    while isinstance(weights, PrefixedDataset):
        name, weights = weights.prefix + name, weights.dataset
    return name, weights


class _MappedLoader(OffloadedWeightsLoader):
    """accelerate's loader, whose weights *are* the pages of their files: it has them in memory twice by itself."""

    def __getitem__(self, key: str) -> torch.Tensor:
        info = None if key in self.state_dict else self.index[key]
        if info is None or info.get("safetensors_file"):
            return super().__getitem__(key)
        file, size = os.path.join(self.save_folder, f"{key}.dat"), math.prod(info["shape"])
        # Not shared: what is written to the weight does not reach the file.
        return torch.from_file(file, size=size, dtype=getattr(torch, info["dtype"])).view(info["shape"])


@contextlib.contextmanager
def _exclusive_use(model: nn.Module) -> Iterator[None]:
    """Keeps other threads from an offloaded model: it has one set of hooks, which are not made for several."""
    thread = threading.get_ident()
    with _lock:
        is_outer = model not in _threads
        if _threads.setdefault(model, thread) != thread:
            raise RuntimeError(
                f"another thread generates with this {type(model).__name__}, which is offloaded, so that its weights "
                "are there for one forward at a time: wait for that call to end"
            )
    try:
        yield
    finally:
        if is_outer:
            del _threads[model]


@contextlib.contextmanager
def offload_session(model: nn.Module, sites: list[MlpSite]) -> Iterator[None]:
    """Within the block, weights on disk are not copied out of their files, the first parameter stays loaded (stock
    assisted decoding sends the candidates to its device), and memory that is free before a projection of an MLP runs
    goes back to the system. After it no weight is loaded, as a forward that was interrupted may have left some.

    Raises `RuntimeError` while another thread is within such a block.
    """
    owner = first_owner(model)
    hook = streaming_hook(owner)
    undo = contextlib.ExitStack()
    with _exclusive_use(model):
        try:
            for _, streaming in streaming_hooks(model):
                _, loader = _source(streaming.weights_map, "")
                if type(loader) is OffloadedWeightsLoader:
                    undo.callback(setattr, loader, "__class__", OffloadedWeightsLoader)
                    loader.__class__ = _MappedLoader
            for site in sites:
                for part in site.parts:
                    if streaming_hook(part) is not None:
                        undo.enter_context(_before_load(part, trim_heap))
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
            for module, left in streaming_hooks(model):
                if any(p is not None and not p.is_meta for p in module._parameters.values()):
                    left.post_forward(module, None)


@contextlib.contextmanager
def capture_weights(
    sites: list[MlpSite],
    resident: Iterable[nn.Module],
    draft_dtype: str | None,
    choose: Callable[[MlpSite], None],
    gather: Callable[[MlpSite, nn.Module, nn.Module], None],
    hold: Callable[[nn.Module, nn.Module], None],
) -> Iterator[None]:
    """Within the block, the draft gets its copies from the weights that accelerate loads for the dense forwards.

    Args:
        sites: the MLPs, of which neurons are gathered.
        resident: the modules outside of them that a draft is yet to hold.
        draft_dtype: of `SiriusConfig`.
        choose: told of an MLP whose neurons have been observed.
        gather: told of an MLP, one of its projections, and the same with its weights loaded.
        hold: told of a resident module, and the same with its weights loaded.
    """
    waiting: dict[nn.Module, nn.Module] = {}

    def narrow(*_) -> None:
        # Until the MLP's neurons are known, when its down projection runs. The weight loaded last stays as it is.
        for loaded in waiting.values():
            weight = narrowed(loaded.weight.detach(), draft_dtype)
            loaded._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def end_observation(site: MlpSite) -> None:
        choose(site)
        for part in site.parts:
            if (loaded := waiting.pop(part, None)) is not None:
                gather(site, part, loaded)

    with contextlib.ExitStack() as undo:
        for module in resident:
            if streaming_hook(module) is not None:
                undo.enter_context(on_load(module, functools.partial(hold, module)))
        for site in sites:
            for part in site.parts:
                if part is not site.down and streaming_hook(part) is not None:
                    undo.callback(part.register_forward_pre_hook(narrow).remove)
                    undo.enter_context(on_load(part, functools.partial(waiting.__setitem__, part)))
            # After the observer's own hook, and before down's weights are loaded.
            undo.callback(site.down.register_forward_pre_hook(lambda *_, site=site: end_observation(site)).remove)
            if streaming_hook(site.down) is not None:
                undo.enter_context(on_load(site.down, functools.partial(gather, site, site.down)))
        yield


@contextlib.contextmanager
def on_load(module: nn.Module, take: Callable[[nn.Module], None]) -> Iterator[None]:
    """Within the block, hands a copy of the module to `take` whenever accelerate has loaded its weights."""
    load = module._hf_hook.pre_forward

    def pre_forward(module, *args, **kwargs):
        inputs = load(module, *args, **kwargs)
        take(bare_copy(module))
        return inputs

    with _loading_by(pre_forward, module._hf_hook):
        yield


@contextlib.contextmanager
def _before_load(module: nn.Module, act: Callable[[], None]) -> Iterator[None]:
    """Within the block, does something whenever accelerate is about to load the module's weights. As a hook of torch's
    it would go with each copy of the module.
    """
    load = module._hf_hook.pre_forward

    def pre_forward(module, *args, **kwargs):
        act()
        return load(module, *args, **kwargs)

    with _loading_by(pre_forward, module._hf_hook):
        yield


@contextlib.contextmanager
def _loading_by(pre_forward: Callable, hook: ModelHook) -> Iterator[None]:
    """Within the block, a hook of accelerate's loads by another `pre_forward`."""
    outer = vars(hook).get("pre_forward")
    hook.pre_forward = pre_forward
    try:
        yield
    finally:
        del hook.pre_forward
        if outer is not None:
            hook.pre_forward = outer
