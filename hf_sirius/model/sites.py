"""Where the MLPs of a model are: the one place that knows how families name gate, up, down and the activation."""

import dataclasses
import functools
import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapters import find_adapters, is_adapted
from .encoder_decoder import read_once
from .projections import is_projection, projection_bias, projection_shape


@dataclasses.dataclass(frozen=True)
class MlpKind:
    """The attribute names of one MLP layout."""

    # the projection whose activation decides. In a plain two-layer MLP it is the first layer; in a fused one it
    # holds gate and up, in this order
    gate: str
    down: str  # the projection back to the hidden size
    up: str | None = None  # the projection that the activation is multiplied with, if it is one of its own
    num_fused: int = 1  # how many projections `gate` holds (2 for a fused gate_up)

    @functools.cached_property
    def part_names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate, self.up, self.down) if name)


MLP_KINDS = (
    MlpKind(gate="gate_proj", up="up_proj", down="down_proj"),  # Llama, Mistral, Gemma, Qwen, OLMo, Cohere, ...
    MlpKind(gate="gate_up_proj", down="down_proj", num_fused=2),  # Phi-3, GLM
    MlpKind(gate="up_proj", down="down_proj"),  # Nemotron, Arcee, MPT
    MlpKind(gate="fc1", down="fc2"),  # OPT, Phi, XGLM, BioGPT, Persimmon
    MlpKind(gate="fc_in", down="fc_out"),  # GPT-J, CodeGen
    MlpKind(gate="c_fc", down="c_proj"),  # GPT-2, GPT-Neo, GPT-BigCode, StarCoder2
    MlpKind(gate="dense_h_to_4h", down="dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    MlpKind(gate="wi_0", up="wi_1", down="wo"),  # T5 v1.1, mT5, UMT5, Pix2Struct
    MlpKind(gate="wi", down="wo"),  # T5
)
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "gelu_impl")


@dataclasses.dataclass(frozen=True)
class MlpSite:
    """One MLP of a model."""

    idx: int  # its place among the model's MLPs, from 0
    name: str  # the dotted name of the module that owns the projections (in OPT the decoder layer itself)
    owner: nn.Module  # that module, in the dense model
    kind: MlpKind  # the attribute names of its parts
    activation: str  # the attribute name of its activation function
    num_neurons: int  # its intermediate size

    @property
    def gate(self) -> nn.Module:
        return getattr(self.owner, self.kind.gate)

    @property
    def up(self) -> nn.Module | None:
        return getattr(self.owner, self.kind.up) if self.kind.up else None

    @property
    def down(self) -> nn.Module:
        return getattr(self.owner, self.kind.down)

    @property
    def part_names(self) -> tuple[str, ...]:
        return self.kind.part_names

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """Its projections: gate, up if there is one, and down."""
        return tuple(getattr(self.owner, name) for name in self.part_names)

    def num_parameters(self) -> int:
        """Parameters of the projections, biases included."""
        return sum(num_parameters(part) for part in self.parts)

    def num_parameters_read(self, share: float, gate_in_full: bool) -> float:
        """Parameters that a step needs with this share of the neurons; to find them it may need the whole gate."""
        gate = num_parameters(self.gate)
        up = num_parameters(self.up) if self.up is not None else 0
        if self.kind.num_fused == 2:
            gate, up = gate / 2, gate / 2
        down_bias = _num_biases(self.down)
        down_weight = num_parameters(self.down) - down_bias
        return gate * (1.0 if gate_in_full else share) + share * (up + down_weight) + down_bias


@dataclasses.dataclass(frozen=True)
class ProjectionSite:
    """One projection of a decoder's attention or MLPs."""

    idx: int  # its place among them, from 0
    name: str  # its dotted name
    owner: nn.Module  # the module that has it, in the dense model
    attribute: str  # its name there

    @property
    def module(self) -> nn.Module:
        return getattr(self.owner, self.attribute)

    def num_parameters(self) -> int:
        """Parameters, the bias included."""
        return num_parameters(self.module)

    def num_parameters_read(self, share: float) -> float:
        """Parameters that a step needs with this share of the inputs."""
        bias = _num_biases(self.module)
        return share * (num_parameters(self.module) - bias) + bias


def num_parameters(projection: nn.Module) -> int:
    """Returns how many parameters a projection stands for, the bias included."""
    return math.prod(projection_shape(projection)) + _num_biases(projection)


def _num_biases(projection: nn.Module) -> int:
    bias = projection_bias(projection)
    return 0 if bias is None else bias.numel()


def neuron_weight(projection: nn.Module) -> torch.Tensor:
    """Returns the weight of a projection as [out_features, in_features] (Conv1D stores the transpose), a view."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight


def find_other_modules(model: nn.Module, sites: list[MlpSite]) -> list[tuple[nn.Module, str]]:
    """Returns the head, and the decoder's modules other than its MLPs' projections, that a draft step passes: (owner,
    attribute name) of each.
    """
    left_out = {part for site in sites for part in site.parts} | read_once(model)
    decoder = set(model.get_decoder().modules())
    head = model.get_output_embeddings()
    return [
        (owner, name)
        for owner in model.modules()
        for name, child in owner.named_children()
        if child not in left_out and (child in decoder or child is head)
    ]


def find_projections(model: nn.Module) -> list[ProjectionSite]:
    """Returns the projections of a model's decoder that a draft step passes, in order, but for the head and what adapts
    others.
    """
    decoder, adapters = set(model.get_decoder().modules()) - read_once(model), find_adapters(model)
    for name, module in model.named_modules():
        if module in decoder and {"original_module", "modules_to_save"} <= module._modules.keys():
            raise ValueError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}, which has several layers in one "
                "place: call merge_and_unload() of the PeftModel before"
            )
    head = model.get_output_embeddings()
    places = [
        (f"{owner_name}.{name}".lstrip("."), owner, name)
        for owner_name, owner in model.named_modules()
        for name, child in owner.named_children()
        if owner not in adapters and is_projection(child) and child in decoder and child is not head
    ]
    return [ProjectionSite(idx, *place) for idx, place in enumerate(places)]


def find_block(model: nn.Module, site: ProjectionSite) -> str | None:
    """Returns the dotted name of the block that a projection lies in, one of a list of modules; `None` if in none."""
    parts = site.name.split(".")
    for i in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[: i + 1])
    return None


def find_mlps(model: nn.Module) -> list[MlpSite]:
    """Returns the MLPs of a model, in order.

    Raises:
        `ValueError` if the model has experts, no MLP of a known kind, or a projection of an unknown type.
    """
    sites = []
    # A vision or audio tower has MLPs of its own, which no draft step passes.
    has_decoder = hasattr(model, "get_decoder")
    decoder = set(model.get_decoder().modules()) - read_once(model) if has_decoder else set(model.modules())
    for name, module in model.named_modules():
        if module not in decoder:
            continue
        if name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts"):
            raise ValueError(
                f"{type(model).__name__} has mixture-of-experts blocks (the first is {name!r}), which hf_sirius "
                "cannot make sparse: use a model with dense MLPs"
            )
        children = {name for name, child in module._modules.items() if child is not None}
        if (kind := next((kind for kind in MLP_KINDS if children.issuperset(kind.part_names)), None)) is None:
            continue
        if (activation := next((name for name in ACTIVATIONS if callable(getattr(module, name, None))), None)) is None:
            continue
        for part_name in kind.part_names:
            part = getattr(module, part_name)
            if is_adapted(part):
                raise ValueError(
                    f"{name}.{part_name} has an adapter ({type(part).__module__}.{type(part).__name__}), and hf_sirius "
                    "takes adapters of the attention alone: merge them with merge_and_unload() of the PeftModel "
                    "(merge_adapter() leaves them in place)"
                )
            if not is_projection(part):
                raise ValueError(
                    f"{name}.{part_name} is a {type(part).__module__}.{type(part).__name__}; hf_sirius can make MLPs "
                    "of Linear, Conv1D and the quantized layers of libraries sparse: load the model without what "
                    "replaces them (a PeftModel's merge_and_unload() does so)"
                )
        num_neurons = projection_shape(getattr(module, kind.down))[1]
        if projection_shape(getattr(module, kind.gate))[0] != kind.num_fused * num_neurons:
            continue
        sites.append(MlpSite(len(sites), name, module, kind, activation, num_neurons))
    if not sites and getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{type(model).__name__} keeps a state in place of a KV-cache, from which drafts cannot be rolled back: "
            "use a model with attention and dense MLPs"
        )
    if not sites:
        layouts = ", ".join("/".join(kind.part_names) for kind in MLP_KINDS)
        raise ValueError(
            f"{type(model).__name__} has no MLP of a known kind: a module with an activation "
            f"({', '.join(ACTIVATIONS)}) and the projections of one of {layouts}. Add a row to "
            "hf_sirius.model.sites.MLP_KINDS if its MLP only has other names, and load a quantized model without fused "
            "modules."
        )
    return sites
