"""The twin's modules: those of the model, with stand-ins where a draft computes something else."""

import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from ..model.accelerate_hooks import is_hooked, is_offloaded, only_aligns, own_forward, streaming_hook
from ..model.experts import ExpertsSite, find_experts
from ..model.observation import uncompiled
from ..model.sites import MlpSite, ProjectionSite, decoder_modules, find_other_modules, find_projections, place_of
from ..model.stock import stock_class
from ..settings.config import SiriusConfig
from ..settings.methods import method_of
from ..sparsity.base import TwinActivation, TwinExperts
from ..sparsity.in_experts import GriffinExperts, ResidentExperts, experts_class_of
from ..weights.draft_modules import TwinModule, TwinProjection
from ..weights.formats import reusable_bytes
from ..weights.kept import Kept
from ..weights.linear import has_kernel
from ..weights.residency import find_resident
from ..weights.shortlist import head_inputs
from .choice import CHOSEN
from .compiled import CompiledStep
from .compiled_verification import CAPTURED, CAPTURING_HOOK
from .copies import copy_with, follow, shallow_copy
from .graph import Graph, GraphUser
from .tree_reading import check_tree


# model -> what is computed, of which draft -> its graph, as long as any twin has it
_graphs: "WeakKeyDictionary[PreTrainedModel, WeakValueDictionary[tuple, Graph]]" = WeakKeyDictionary()
_lock = threading.Lock()
_STEP, _VERIFICATION = "draft step", "verification"  # what graphs compute
# A name within transformers.
_IS_HOOKED = "_output_capturing_hooks_installed"


@dataclasses.dataclass
class Twin:
    """The modules of a twin, and what all its drafts have in common."""

    module: PreTrainedModel  # the root, of the model's class
    config: SiriusConfig  # the settings
    sites: list[MlpSite]  # the MLPs of the dense model
    experts: list[ExpertsSite]  # its blocks of experts
    method_sites: list[MlpSite] | list[ProjectionSite]  # what the method acts on
    # the dense model's modules of which drafts hold copies, gathered neurons aside, with the `draft_dtype` of each
    resident: dict[nn.Module, str | None]
    kept: Kept  # what stays from call to call
    is_offloaded: bool  # whether accelerate streams weights of the dense model
    linears: list[nn.Linear]  # layers of the dense model whose weight a kernel reads as it is
    # the step and the verification as graphs, where `compile_draft` asks for them; none for streamed weights
    compiled: CompiledStep | None
    verification: GraphUser | None
    # each copied or replaced module with the dense model's that it stands for, but for the root
    copies: list[tuple[nn.Module, nn.Module]]

    def __call__(self, model: PreTrainedModel, **inputs: Any):
        """A forward, as a draft step makes it; `model` is the dense one, whose modes are followed."""
        self.follow(model, inputs)
        return self.module(**inputs)

    def follow(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        """Does what a forward needs: the copied containers have modes of their own, which have to follow the
        originals', and hooks that record states.
        """
        if self.module.training != model.training:
            self.follow_mode(model)
        if any(inputs.get(name, getattr(model.config, name, False)) for name in CAPTURED):
            self._share_capturing_hooks(model)

    def follow_attributes(self, model: PreTrainedModel) -> None:
        """Gives the twin's own modules the attributes that the dense model's have by now, such as which of its adapters
        a layer of PEFT uses.
        """
        for copied, original in self._pairs(model):
            if isinstance(copied, stock_class(original)):
                follow(copied, original)
        if self.compiled is not None:
            self.compiled.follow_attributes()

    def follow_mode(self, model: PreTrainedModel) -> None:
        """Sets the modes of the twin's own modules to those of the dense model's."""
        for copied, original in self._pairs(model):
            copied.training = original.training

    def _pairs(self, model: PreTrainedModel) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.module, model
        yield from self.copies

    def _share_capturing_hooks(self, model: PreTrainedModel) -> None:
        """Lays the hooks that record attentions and hidden states as the dense model would. Left to itself transformers
        lays them for the twin too, and so twice over the modules that both share.
        """
        models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        if not any(getattr(module, _IS_HOOKED, False) for module in models):
            maybe_install_capturing_hooks(model)
        for copied, original in self._pairs(model):
            if not isinstance(copied, stock_class(original)):  # a stand-in
                continue
            for key, hook in original._forward_hooks.items():
                if getattr(hook, "__name__", "") == CAPTURING_HOOK:
                    copied._forward_hooks.setdefault(key, hook)
            if hasattr(original, _IS_HOOKED):
                setattr(copied, _IS_HOOKED, getattr(original, _IS_HOOKED))


def build_twin(model: PreTrainedModel, config: SiriusConfig, sites: list[MlpSite]) -> Twin:
    """Builds the twin of a model: copies of the containers on the way to what is replaced, and the model's own modules
    for all the rest.

    Nothing of the dense model changes. The copies share their dicts of parameters and buffers with the originals.
    """
    method = method_of(config)
    method_sites = sites if method.acts_on == "mlps" else find_projections(model)
    replacements: dict[int, dict[str, nn.Module]] = {}
    for site in method_sites:
        for path, new in method.replacements(site).items():
            owner, name = place_of(site.owner, path)
            replacements.setdefault(id(owner), {})[name] = new
    experts, _ = find_experts(model, decoder_modules(model))
    for block in experts:
        replacements.setdefault(id(block.owner), {})[block.attribute] = TwinExperts(block.module, block.idx)
    held_in_part = GriffinExperts, ResidentExperts
    gathered = [
        block for block in experts if issubclass(experts_class_of(method, block, is_offloaded(model)), held_in_part)
    ]
    resident = find_resident(model, sites, config, method.gathers, gathered)
    in_mlps = [place for site in sites for place in site.places]
    for owner, name in (*(in_mlps if method.gathers else ()), *((place.owner, place.name) for place in resident)):
        parts = replacements.setdefault(id(owner), {})
        if name not in parts:  # the method's own comes first, be it an activation with parameters
            parts[name] = TwinModule(getattr(owner, name))
    linears = []
    for owner, name in (*find_other_modules(model, sites), *in_mlps):
        if has_kernel(module := getattr(owner, name)):
            replacements.setdefault(id(owner), {}).setdefault(name, TwinProjection(module))
            linears += [module] if type(module) is nn.Linear else []
    replacements = {owner_id: parts for owner_id, parts in replacements.items() if parts}
    owners = {id(module): module for module in model.modules() if id(module) in replacements}
    copies: dict[int, nn.Module] = {}
    root = copy_with(model, replacements, copies)
    pairs = [(copies[id(module)], module) for module in model.modules() if id(module) in copies and module is not model]
    for owner_id, parts in replacements.items():
        for name, new in parts.items():
            dense = getattr(owners[owner_id], name)
            pairs.append((new, dense if isinstance(dense, nn.Module) else owners[owner_id]))
    held = {place.module: place.draft_dtype for place in resident}
    compiled, verification, graphs = None, None, []
    if config.compile_draft:
        graphs.append(_graph_of(model, config))
        compiled = CompiledStep(*_with_places(root), graphs[0], model.config)
        if any(is_hooked(module) and not only_aligns(module) for module in model.modules()):
            compiled.broken = "a hook of another kind than accelerate's for devices lies over a module"
    if config.compile_draft and not is_offloaded(model):
        graphs.append(_verification_of(model))
        verification = GraphUser(graphs[-1])
        try:
            with uncompiled(model):
                check_tree(model)  # which is read by such masks and positions as a graph is given
        except ValueError:
            verification.broken = "the model takes no masks, or no positions, of the caller's"
    return Twin(
        module=root,
        config=config,
        sites=sites,
        experts=experts,
        method_sites=method_sites,
        resident=held,
        kept=Kept(
            {module: draft_dtype for module, draft_dtype in held.items() if streaming_hook(module) is None},
            reusable_bytes(sites, config) if method.gathers else {},
            functools.partial(head_inputs, model),
            graphs,
        ),
        is_offloaded=is_offloaded(model),
        linears=linears,
        compiled=compiled,
        verification=verification,
        copies=pairs,
    )


def _graph_of(model: PreTrainedModel, config: SiriusConfig) -> Graph:
    """Returns the graph of a twin's drafts, that of an earlier twin where these were the same."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return Graph(_STEP)  # torch does not look whether the hooks of another one are the same
    return _shared_graph(model, _STEP, *(getattr(config, name) for name in CHOSEN if name != "calibration"))


def _verification_of(model: PreTrainedModel) -> Graph:
    """Returns the graph of a model's verifications, which do not depend on the draft."""
    return _shared_graph(model, _VERIFICATION)


def _shared_graph(model: PreTrainedModel, *key: Any) -> Graph:
    """Returns the graph of a model that has this key, which begins with what it computes."""
    with _lock:
        of_model = _graphs.setdefault(model, WeakValueDictionary())
        graph = of_model.get(key)
        if graph is None:
            graph = of_model[key] = Graph(key[0])
    return graph


def _with_places(
    root: nn.Module,
) -> tuple[nn.Module, list[tuple[nn.Module, str, nn.Module]], list[tuple[nn.Module, nn.Module]]]:
    """Returns a twin's tree with places in it for what stands in for dense modules, or has a hook of accelerate's, what
    stood there, and each copied module with the twin's own.
    """
    found = [
        (owner, name, child)
        for owner in root.modules()
        for name, child in owner._modules.items()
        if isinstance(child, TwinModule | TwinActivation)
        or (child is not None and is_hooked(child) and not child._modules)
    ]
    replacements: dict[int, dict[str, nn.Module | None]] = {id(each): {} for each in root.modules() if is_hooked(each)}
    for owner, name, child in found:
        if is_hooked(child):
            own_forward(child)  # which may not be fit for a copy
        replacements.setdefault(id(owner), {})[name] = None
    copies: dict[int, nn.Module] = {}
    module = copy_with(root, replacements, copies, keeps_hooks=False)
    module = shallow_copy(root, keeps_hook=False) if module is root else module
    for copied in (module, *copies.values()):
        copied.training = False
    pairs = [(copies[id(own)], own) for own in root.modules() if id(own) in copies]
    return module, [(copies[id(owner)], name, child) for owner, name, child in found], pairs
