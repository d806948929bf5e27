"""Where the MLPs of a model are: the one place that knows how families name gate, up, down and the activation."""

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapters import base_layer, find_adapters, is_adapted
from .encoder_decoder import read_once
from .experts import find_experts, is_experts
from .projections import is_projection, is_router, projection_bias, projection_shape


@dataclasses.dataclass(frozen=True)
class MlpKind:
    """The attribute names of one MLP layout; dotted where a part lies in a module of its own."""

    # the projection whose activation decides. In a plain two-layer MLP it is the first layer; in a fused one it
    # holds gate and up, in this order
    gate: str
    down: str  # the projection back to the hidden size
    up: str | None = None  # the projection that the activation is multiplied with, if it is one of its own
    num_fused: int = 1  # how many projections `gate` holds (2 for a fused gate_up)
    activation: str | None = None  # where it has none of the names of `ACTIVATIONS`; "" where it is no attribute

    @functools.cached_property
    def part_names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate, self.up, self.down) if name)

    def is_in(self, module: nn.Module) -> bool:
        """Whether a module has all parts, as modules: fused experts have some as parameters."""
        return all(isinstance(part_of(module, name), nn.Module) for name in self.part_names)

    def activation_in(self, module: nn.Module) -> str | None:
        """Returns the name of a module's activation, if it has one."""
        if self.activation == "":
            return ""
        names = ACTIVATIONS if self.activation is None else (self.activation,)
        return next((name for name in names if callable(part_of(module, name))), None)


def part_of(owner: nn.Module, path: str) -> Any:
    """Returns a module or function by its dotted path in a module; `None` where there is none."""
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def place_of(owner: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Returns the module that has what a dotted path leads to, and its attribute."""
    parent, _, name = path.rpartition(".")
    return owner.get_submodule(parent), name


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
    MlpKind(gate="fc1", down="fc2", num_fused=2),  # Moshi
    MlpKind(gate="Wi", down="Wo", num_fused=2),  # ModernBERT
    MlpKind(gate="intermediate.dense", down="output.dense", activation="intermediate.intermediate_act_fn"),  # BERT, ...
    MlpKind(gate="ffn.0", down="ffn.2", activation="ffn.1"),  # CTRL
    MlpKind(gate="w1", up="w3", down="w2", activation=""),  # LFM2
)
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "gelu_impl", "activation_function")


@dataclasses.dataclass(frozen=True)
class MlpSite:
    """One MLP of a model."""

    idx: int  # its place among the model's MLPs, from 0
    name: str  # the dotted name of the module that owns the projections (in OPT the decoder layer itself)
    owner: nn.Module  # that module, in the dense model
    kind: MlpKind  # the attribute names of its parts
    activation: str  # the attribute name of its activation function, "" of one that the forward names
    num_neurons: int  # its intermediate size

    @property
    def gate(self) -> nn.Module:
        return self.owner.get_submodule(self.kind.gate)

    @property
    def up(self) -> nn.Module | None:
        return self.owner.get_submodule(self.kind.up) if self.kind.up else None

    @property
    def down(self) -> nn.Module:
        return self.owner.get_submodule(self.kind.down)

    @property
    def part_names(self) -> tuple[str, ...]:
        return self.kind.part_names

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """Its projections: gate, up if there is one, and down."""
        return tuple(self.owner.get_submodule(name) for name in self.part_names)

    @property
    def places(self) -> tuple[tuple[nn.Module, str], ...]:
        """The module that has each of its projections, and the attribute there."""
        return tuple(place_of(self.owner, name) for name in self.part_names)

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


# Parts of decoders that no draft step passes: of a decoder by itself what attends to an encoder, and towers.
_NOT_PASSED = frozenset(("encoder_attn", "image_encoder", "visual_projection", "embed_tokens_extend"))


def decoder_modules(model: nn.Module) -> set[nn.Module]:
    """Returns the modules of a model's decoder that a draft step passes."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is model.get_output_embeddings():  # as ModernBERT names it
        decoder = model.base_model
    not_passed = _NOT_PASSED - {"encoder_attn"} if model.config.is_encoder_decoder else _NOT_PASSED
    passed = {module for name, module in decoder.named_modules() if not_passed.isdisjoint(name.split("."))}
    return passed - read_once(model)


def find_other_modules(model: nn.Module, sites: list[MlpSite]) -> list[tuple[nn.Module, str]]:
    """Returns the head, and the decoder's modules other than its MLPs' projections, that a draft step passes: (owner,
    attribute name) of each.
    """
    left_out = {inner for site in sites for part in site.parts for inner in part.modules()}
    decoder = decoder_modules(model)
    head = model.get_output_embeddings()
    return [
        (owner, name)
        for owner in model.modules()
        for name, child in owner.named_children()
        if child not in left_out and (child in decoder or child is head)
    ]


def find_projections(model: nn.Module) -> list[ProjectionSite]:
    """Returns the projections of a model's decoder that a draft step passes, in order, but for the head, routers, what
    adapts others, and what a module of embeddings has: its inputs may be zeros for the most part (RoCBert).
    """
    decoder, adapters = decoder_modules(model), find_adapters(model)
    for name, module in model.named_modules():
        if module in decoder and {"original_module", "modules_to_save"} <= module._modules.keys():
            raise ValueError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}, which has several layers in one "
                "place: call merge_and_unload() of the PeftModel before"
            )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()

    def has_embeddings_alone(owner: nn.Module) -> bool:
        parts = owner._modules.values()
        return embedding in parts and not any(isinstance(part, nn.ModuleList) for part in parts)

    places = [
        (f"{owner_name}.{name}".lstrip("."), owner, name)
        for owner_name, owner in model.named_modules()
        for name, child in owner.named_children()
        if owner not in adapters and not is_router(owner) and not has_embeddings_alone(owner)
        if is_projection(child) and child in decoder and child is not head
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
    """Returns the MLPs of a model, in order: none where all are experts (see `find_experts`).

    Raises:
        `ValueError` if the model has neither an MLP nor experts of a known kind, or a projection of an unknown type.
    """
    sites = []
    # A vision or audio tower has MLPs of its own, which no draft step passes.
    decoder = decoder_modules(model)
    for name, module in model.named_modules():
        if module not in decoder:
            continue
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and is_experts(name.rpartition(".")[2], module):
            raise ValueError(
                f"{type(model).__name__} has mixture-of-experts blocks whose experts are modules of their own (first "
                f"{name!r}), which hf_sirius cannot make sparse: use a model whose experts are fused, as transformers "
                "has them"
            )
        kinds = [kind for kind in MLP_KINDS if kind.is_in(module) and kind.activation_in(module) is not None]
        for part_name in kinds[0].part_names if kinds else ():
            part = part_of(module, part_name)
            if is_adapted(part) and is_projection(base_layer(part)) and hasattr(part, "merge"):
                continue
            if not is_projection(part):
                raise ValueError(
                    f"{name}.{part_name} is a {type(part).__module__}.{type(part).__name__}; hf_sirius can make MLPs "
                    "of Linear, Conv1D and the quantized layers of libraries sparse: load the model without what "
                    "replaces them (a PeftModel's merge_and_unload() does so)"
                )
        for kind in kinds:
            num_neurons = projection_shape(part_of(module, kind.down))[1]
            if projection_shape(part_of(module, kind.gate))[0] == kind.num_fused * num_neurons:
                sites.append(MlpSite(len(sites), name, module, kind, kind.activation_in(module), num_neurons))
                break
    experts, others = find_experts(model, decoder) if not sites else ([], [])
    if not sites and not experts and others:
        raise ValueError(
            f"{type(model).__name__} has mixture-of-experts blocks that hf_sirius cannot make sparse (the first is "
            f"{others[0]!r}), and no MLP beside them: they are not called with the experts of each token, or keep "
            "their weights in another form. Add a row to hf_sirius.model.experts.EXPERTS_KINDS if only names differ"
        )
    if not sites and not experts:
        raise ValueError(_unknown(model, decoder))
    return sites


def _unknown(model: nn.Module, decoder: set[nn.Module]) -> str:
    """Says what was looked for, and which module is likely to be the MLP that was not found."""
    likely = []
    for name, module in model.named_modules():
        inner = module.named_modules() if module in decoder else ()
        shapes = {path: projection_shape(part) for path, part in inner if path.count(".") < 2 and is_projection(part)}
        into = {in_features for out_features, in_features in shapes.values() if out_features < in_features}
        if any(out_features in (size, 2 * size) for size in into for out_features, _ in shapes.values()):
            likely.append((name, module, shapes))
    found = ""
    if likely:
        name, module, shapes = min(likely, key=lambda place: len(place[2]))
        projections = ", ".join(f"{path} [{shape[0]}, {shape[1]}]" for path, shape in shapes.items())
        found = f" {name} is a {type(module).__module__}.{type(module).__name__}, with the projections {projections}."
    layouts = ", ".join("/".join(kind.part_names) for kind in MLP_KINDS)
    return (
        f"{type(model).__name__} has no MLP of a known kind.{found} What was looked for is a module with an activation "
        f"({', '.join(ACTIVATIONS)}) and the projections of one of {layouts}. Add a row to MLP_KINDS in {__name__} if "
        "only the names differ, and load a quantized model without fused modules"
    )
