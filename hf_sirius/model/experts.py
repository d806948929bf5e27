"""Where a model's experts are, and how the parameters of a block's experts lie: the one place that knows it."""

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .accelerate_hooks import bare_copy


@dataclasses.dataclass(frozen=True)
class ExpertsKind:
    """The names of the parameters that hold all experts of a block, each [num_experts, ...]."""

    gate: str  # the projection whose activation decides; where `num_fused` is 2 it holds gate and up
    down: str
    num_fused: int
    holder: str = ""  # the attribute that has them, where it is not the experts' module itself


EXPERTS_KINDS = (
    ExpertsKind(gate="gate_up_proj", down="down_proj", num_fused=2),  # Mixtral, Qwen, DeepSeek, gpt-oss, ...
    ExpertsKind(gate="up_proj", down="down_proj", num_fused=1),  # Nemotron-H
    ExpertsKind(gate="w1", down="w2", num_fused=1, holder="mlp"),  # DBRX
)
_TOP_K = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token")
_GATING = "_apply_gate"  # transformers' name for what makes an expert's neurons of its gate's and up's outputs
# Of transformers' implementations those that call it; a block's own loop over its experts may not.
_CALLING_IT = ("batched_mm", "grouped_mm")


@dataclasses.dataclass(frozen=True)
class ExpertsSite:
    """The experts of one block."""

    idx: int  # its place among the model's blocks of experts, from 0
    name: str  # the dotted name of the module that holds them
    owner: nn.Module  # the block, in the dense model
    attribute: str  # the name of that module in the block
    kind: ExpertsKind
    num_experts: int  # those that have weights
    top_k: int  # how many a token is given

    @property
    def module(self) -> nn.Module:
        return getattr(self.owner, self.attribute)

    @property
    def opens(self) -> bool:
        """Whether a draft can act inside: the module is of the form that transformers' implementations take."""
        return hasattr(self.module, "has_gate") and not self.kind.holder

    @property
    def num_neurons(self) -> int:
        """The intermediate size of an expert."""
        down = getattr(self.module, self.kind.down)
        return down.shape[1 if self.module.is_transposed else 2]

    @property
    def has_activation(self) -> bool:
        """Whether act(gate) can be seen by itself, before up is needed."""
        return not self.module.has_gate or hasattr(self.module, "act_fn")

    def num_kept_neurons(self, density: float) -> int:
        """Returns how many neurons of each expert are gathered: whole 16 bytes, as torch's grouped products want."""
        num_kept = max(1, round(density * self.num_neurons))
        multiple = max(1, 16 // getattr(self.module, self.kind.down).itemsize)
        return min(-(-num_kept // multiple) * multiple, self.num_neurons)

    def gathered_bytes(self, density: float) -> float:
        """Returns what such neurons of all experts take."""
        names = (self.kind.gate, f"{self.kind.gate}_bias", self.kind.down)
        parameters = [self.module._parameters.get(name) for name in names]
        num_bytes = sum(parameter.nbytes for parameter in parameters if parameter is not None)
        return num_bytes * self.num_kept_neurons(density) / self.num_neurons

    def num_parameters(self) -> int:
        """Parameters of all experts."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def share_read(self, gate: float, up: float, down: float) -> float:
        """Returns the share of an expert's parameters that these shares of its gate, up and down are. Biases count as
        their projection does.
        """
        if not self.opens:
            return 1.0
        sizes = {
            name: parameter.numel() for name, parameter in self.module._parameters.items() if parameter is not None
        }
        first = sum(size for name, size in sizes.items() if name.startswith(self.kind.gate))
        last = sum(size for name, size in sizes.items() if name.startswith(self.kind.down))
        others = sum(sizes.values()) - first - last
        up = up if self.kind.num_fused == 2 else gate
        return (first * (gate + up) / 2 + last * down + others) / sum(sizes.values())


def find_experts(model: nn.Module, decoder: set[nn.Module]) -> tuple[list[ExpertsSite], list[str]]:
    """Returns the experts of a decoder's blocks that are called with the experts of each token, in order, and the names
    of all other modules of experts, which drafts leave as they are.
    """
    sites: list[ExpertsSite] = []
    others: list[str] = []
    for owner_name, owner in model.named_modules():
        for attribute, module in owner.named_children():
            if module not in decoder or not is_experts(attribute, module):
                continue
            name = f"{owner_name}.{attribute}".lstrip(".")
            kind = next((kind for kind in EXPERTS_KINDS if _is_of(module, kind)), None)
            top_k = _top_k(model, owner)
            if kind is None or top_k is None or not _is_routed(module):
                others.append(name)
                continue
            holder = getattr(module, kind.holder) if kind.holder else module
            num_experts = getattr(module, "num_experts", None) or len(getattr(holder, kind.down))
            sites.append(ExpertsSite(len(sites), name, owner, attribute, kind, num_experts, top_k))
    return sites, others


def is_experts(attribute: str, module: nn.Module) -> bool:
    return attribute == "experts" or type(module).__name__.endswith("Experts")


def _is_of(module: nn.Module, kind: ExpertsKind) -> bool:
    holder = getattr(module, kind.holder, None) if kind.holder else module
    return all(isinstance(getattr(holder, name, None), torch.Tensor) for name in (kind.gate, kind.down))


def _is_routed(module: nn.Module) -> bool:
    """Whether experts are called with hidden states, and the experts and weights of each token."""
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    return len(parameters) == 4  # with self


def _top_k(model: nn.Module, block: nn.Module) -> int | None:
    config = model.config.get_text_config()
    for place in (block, *block.children(), config):
        for name in _TOP_K:
            if isinstance(value := getattr(place, name, None), int):
                return value
    return None


def num_experts_read(site: ExpertsSite, top_k_index: torch.Tensor, at_once: bool) -> torch.Tensor:
    """Returns how many experts are read for tokens that are a step each, or one step `at_once`.

    Args:
        top_k_index: long [num_tokens, num_experts_per_token]. Indices behind the experts stand for none.
    """
    indices = top_k_index.flatten().unique() if at_once else top_k_index
    return (indices < site.num_experts).sum()


class Tap(nn.Module):
    """Stands where an expert's activation was; what it makes goes through `change`."""

    def __init__(self, made_by: Callable, change: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        # Not submodules, as all of it belongs to others.
        self.__dict__.update(made_by=made_by, change=change)

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.change(self.made_by(*args))


def tapped(module: nn.Module, at: str, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Returns a copy of experts over the same parameters, in which values of all pairs of a token and one of its
    experts go through `change`, [num_pairs, num_neurons].

    Args:
        module: experts that are open to drafts ([`ExpertsSite.opens`]).
        at: "activation", which is act(gate) where the experts have an activation of its own, or "neurons", the input of
            the down projection.
    """
    tap = bare_copy(module)
    tap._modules = dict(module._modules)
    if not module.has_gate or (at == "activation" and hasattr(module, "act_fn")):
        tap.__dict__.pop("act_fn", None)  # it may be a plain function
        tap._modules["act_fn"] = Tap(module.act_fn, change)
    else:
        tap.__dict__[_GATING] = Tap(getattr(module, _GATING), change)
    # A loop over experts calls neither for all pairs at once.
    is_at_once = at == "activation" and hasattr(module, "act_fn")
    if not is_at_once and module.config._experts_implementation not in _CALLING_IT:
        tap.__dict__["config"] = config = copy.copy(module.config)
        # torch has no grouped products in float64.
        is_double = next(module.parameters()).dtype == torch.float64
        config._experts_implementation_internal = "batched_mm" if is_double else "grouped_mm"
    return tap


def experts_of_pairs(module: nn.Module, top_k_index: torch.Tensor) -> torch.Tensor:
    """Returns the expert of each row that a module tapped at its neurons hands over, long [num_pairs].

    Args:
        top_k_index: long [num_tokens, num_experts_per_token].
    """
    pairs = top_k_index.flatten()
    return pairs if module.config._experts_implementation == "batched_mm" else pairs.sort().values


def gathered(site: ExpertsSite, loaded: nn.Module, neuron_indices: torch.Tensor) -> nn.Module:
    """Returns a copy of experts with some neurons of each.

    Args:
        loaded: the site's module, or the same with its weights where they are elsewhere (offloaded).
        neuron_indices: long [num_experts, num_kept], ascending.
    """
    module, kind = loaded, site.kind
    indices = neuron_indices.to(getattr(module, kind.down).device)
    rows = indices
    if kind.num_fused == 2 and module.is_concatenated:
        rows = torch.cat([indices, indices + site.num_neurons], dim=1)
    elif kind.num_fused == 2:
        rows = torch.stack([2 * indices, 2 * indices + 1], dim=2).flatten(1)
    first, last = (2, 1) if module.is_transposed else (1, 2)
    smaller = bare_copy(module)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if name == kind.gate:
            taken = _take(parameter, rows, first)
        elif name == f"{kind.gate}_bias":
            taken = _take(parameter, rows, 1)
        elif name == kind.down:
            taken = _take(parameter, indices, last)
        else:
            continue
        smaller._parameters[name] = nn.Parameter(taken, requires_grad=False)
    return smaller


def _take(weight: torch.Tensor, indices: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns weight[e] at indices[e] along dim, for each expert e."""
    taken = [part.index_select(dim - 1, mine) for part, mine in zip(weight.detach(), indices, strict=True)]
    return torch.stack(taken)


def some_experts(module: nn.Module, experts: torch.Tensor) -> nn.Module:
    """Returns a copy of experts with some of them alone, long [num_kept]."""
    fewer = bare_copy(module)
    fewer.num_experts = len(experts)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            kept = parameter.detach().index_select(0, experts.to(parameter.device))
            fewer._parameters[name] = nn.Parameter(kept, requires_grad=False)
    return fewer


def neuron_norms(site: ExpertsSite, loaded: nn.Module) -> torch.Tensor:
    """Returns the weight norm of each expert's neurons, that of its rows of gate and up times that of its column of
    down: [num_experts, num_neurons].
    """
    module, kind = loaded, site.kind
    gate, down = getattr(module, kind.gate).detach(), getattr(module, kind.down).detach()
    first = gate.norm(dim=1 if module.is_transposed else 2)
    last = down.norm(dim=2 if module.is_transposed else 1)
    if kind.num_fused == 2:
        shape = (len(first), 2, -1) if module.is_concatenated else (len(first), -1, 2)
        first = first.view(shape).norm(dim=1 if module.is_concatenated else 2)
    return first * last


def routing(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what experts are called with: hidden states, and the experts and weights of each token."""
    hidden_states, top_k_index, top_k_weights = (*args, *kwargs.values())
    return hidden_states, top_k_index, top_k_weights
