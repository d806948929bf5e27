"""What a method does within a mixture's experts, for the length of one call: a class for each way."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..model.accelerate_hooks import streaming_hook
from ..model.experts import (
    ExpertsSite,
    experts_of_pairs,
    gathered,
    neuron_norms,
    num_experts_read,
    routing,
    some_experts,
    tapped,
)
from ..model.observation import uncompiled
from ..settings.config import SiriusConfig
from ..weights.offload import on_load
from .cutoffs import Cutoffs


_observer: ContextVar[object | None] = ContextVar("hf_sirius_experts_observer", default=None)


class WholeExperts:
    """The experts of one block as they are. Counts what draft steps read of them.

    Attributes:
        observed: what is watched of the prefill, as `tapped` takes it; `None` for nothing.
        cutoffs: as those of `SparsityMethod`.
    """

    observed: ClassVar[Literal["activation", "neurons"] | None] = None
    needs_open: ClassVar[bool] = False  # whether it acts inside, as only experts that are open to drafts let it
    cutoffs: Cutoffs | None = None

    def __init__(self, config: SiriusConfig, site: ExpertsSite):
        self.config, self.site = config, site
        self._tapped: tuple[nn.Module, nn.Module] | None = None
        self._num_read: torch.Tensor | int = 0
        self._num_routed: torch.Tensor | int = 0
        self._num_steps = 0

    def run(self, module: nn.Module, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """Returns what a draft has of the experts.

        Args:
            module: what runs: the model's experts, or what is held in their place.
            hidden_states, routing: as `module` takes them.
        """
        self.count(*routing)
        return module(hidden_states, *routing)

    def count(self, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        """Counts the experts of steps that were routed so, of which `kept` are read, all by default."""
        at_once = self.config.tree_width > 1
        routed = num_experts_read(self.site, top_k_index, at_once)
        self._num_routed += routed
        self._num_read += routed if kept is None else num_experts_read(self.site, kept, at_once)
        self._num_steps += 1 if at_once else len(top_k_index)

    def observe_routing(self, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None:
        """Takes in where the prefill's tokens were sent."""

    def observe_inputs(self, hidden_states: torch.Tensor) -> None:
        """Takes in the experts' inputs of the prefill, [num_tokens, hidden_size]."""

    def observe(self, values: torch.Tensor, experts: Callable[[], torch.Tensor]) -> None:
        """Takes in values of the prefill, [num_pairs, num_neurons]; `experts` returns those of the pairs."""

    def choose(self, module: nn.Module) -> nn.Module | None:
        """Chooses what is chosen once per prompt. Returns what a draft holds in place of the experts, `None` for
        nothing; `module` has their weights.
        """

    def share(self) -> float | None:
        """Returns the share of an expert that a step needs where it needs the expert; `None` before it is known."""
        return 1.0

    def density(self) -> float | None:
        """Returns the share that was kept of what `density` counts, or `None` before the first step."""
        return 1.0 if self._num_steps else None

    def num_parameters_read(self) -> float | None:
        """Returns how many parameters a step read on average, or `None` before the first one."""
        share = self.share()
        if share is None or not (self._num_steps or self.config.compile_draft):
            return None
        # A compiled step counts nothing, and all that is routed is read there.
        num_read = float(self._num_read) / self._num_steps if self._num_steps else float(self.site.top_k)
        return share * num_read * self._size()

    def num_parameters_routed(self) -> float:
        """Returns how many a step of the dense model would have read."""
        routed = float(self._num_routed) / self._num_steps if self._num_steps else float(self.site.top_k)
        return routed * self._size()

    def _size(self) -> float:
        return self.site.num_parameters() / self.site.num_experts

    def _tap(self, module: nn.Module, at: Literal["activation", "neurons"], change: Callable) -> nn.Module:
        if self._tapped is None or self._tapped[0] is not module:
            self._tapped = module, tapped(module, at, change)
        return self._tapped[1]


class FewerExperts(WholeExperts):
    """A token's experts with the largest weights, the share `density` of them; their weights add up to as much as all
    of them did.
    """

    def run(self, module, hidden_states, top_k_index, top_k_weights):
        num_kept = max(1, round(self.config.density * top_k_index.shape[-1]))
        if num_kept < top_k_index.shape[-1]:
            kept = top_k_weights.topk(num_kept, dim=-1)
            scale = top_k_weights.sum(dim=-1, keepdim=True) / kept.values.sum(dim=-1, keepdim=True)
            routed, top_k_index = top_k_index, top_k_index.gather(-1, kept.indices)
            self.count(routed, top_k_weights, kept=top_k_index)
            return module(hidden_states, top_k_index, kept.values * scale)
        return super().run(module, hidden_states, top_k_index, top_k_weights)

    def density(self):
        return float(self._num_read) / float(self._num_routed) if self._num_steps else None


class ResidentExperts(WholeExperts):
    """Of an offloaded model the experts that the prompt used most, the share `density` of all, which a draft holds. Of
    a token's experts it reads those that are there; their weights add up to as much as all of them did.
    """

    def __init__(self, config, site):
        super().__init__(config, site)
        self._usage: torch.Tensor | None = None
        self.resident: torch.Tensor | None = None

    def observe_routing(self, top_k_index, top_k_weights):
        if self._usage is None:
            self._usage = top_k_weights.new_zeros(self.site.num_experts)
        self._usage.index_add_(0, top_k_index.flatten(), top_k_weights.flatten())

    def choose(self, module):
        num_held = max(1, round(self.config.density * self.site.num_experts))
        self.resident = self._usage.topk(num_held).indices.sort().values
        return some_experts(module, self.resident)

    def run(self, module, hidden_states, top_k_index, top_k_weights):
        if self.resident is None:
            return super().run(module, hidden_states, top_k_index, top_k_weights)
        place = torch.full((self.site.num_experts,), -1, device=top_k_index.device)
        place[self.resident] = torch.arange(len(self.resident), device=place.device)
        places = place[top_k_index]
        is_here = places >= 0
        self.count(top_k_index, top_k_weights, kept=top_k_index.masked_fill(~is_here, self.site.num_experts))
        weights = top_k_weights.masked_fill(~is_here, 0)
        scale = top_k_weights.sum(dim=-1, keepdim=True) / weights.sum(dim=-1, keepdim=True)
        weights = torch.where(is_here.any(dim=-1, keepdim=True), weights * scale, weights)
        return module(hidden_states, places.clamp_min(0), weights)

    def density(self):
        return float(self._num_read) / float(self._num_routed) if self._num_steps else None


class CatsExperts(WholeExperts):
    """Of each pair of a token and an expert the neurons whose |act(gate x)| is large, as in `Cats`."""

    observed = "activation"
    needs_open = True

    def __init__(self, config, site):
        super().__init__(config, site)
        self.cutoffs = Cutoffs(config, 1)

    def observe(self, values, experts):
        if self.config.selection == "threshold":
            self.cutoffs.observe(0, values)

    def choose(self, module):
        if self.config.selection == "threshold":
            self.cutoffs.choose(0)

    def run(self, module, hidden_states, *routing):
        return super().run(self._tap(module, "activation", self._drop), hidden_states, *routing)

    def _drop(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.cutoffs.keep(0, values.abs())

    def density(self):
        return self.cutoffs.share(0)

    def share(self):
        kept = self.density()
        if kept is None:
            return None
        # What cannot be seen before up is known is chosen by the neurons themselves.
        return self.site.share_read(1.0, kept if self.site.has_activation else 1.0, kept)


class GriffinExperts(WholeExperts):
    """Of each expert the neurons with the largest statistic of the prompt's tokens that were routed there, as in
    `Griffin`; of an expert that saw none those with the largest weights.
    """

    observed = "neurons"
    needs_open = True

    def __init__(self, config, site):
        super().__init__(config, site)
        self._statistics: torch.Tensor | None = None
        self.neuron_indices: torch.Tensor | None = None  # long [num_experts, num_kept]

    def observe(self, values, experts):
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        shares = (values / torch.linalg.vector_norm(values, dim=-1, keepdim=True).clamp_min(1e-12)).square()
        if self._statistics is None:
            self._statistics = shares.new_zeros(self.site.num_experts, values.shape[-1])
        self._statistics.index_add_(0, experts(), shares)

    def choose(self, module):
        statistics = self._statistics
        if statistics is None:
            raise ValueError(f"nothing was seen of {self.site.name} while the model read the prompt")
        is_unseen = ~statistics.any(dim=1)
        if is_unseen.any():
            statistics = torch.where(is_unseen[:, None], neuron_norms(self.site, module).to(statistics), statistics)
        num_kept = self.site.num_kept_neurons(self.config.density)
        self.neuron_indices = statistics.topk(num_kept, dim=1).indices.sort(dim=1).values
        return gathered(self.site, module, self.neuron_indices)

    def density(self):
        return None if self.neuron_indices is None else self.neuron_indices.shape[1] / self.site.num_neurons

    def share(self):
        kept = self.density()
        return None if kept is None else self.site.share_read(kept, kept, kept)


class TealExperts(WholeExperts):
    """Of each pair of a token and an expert the large inputs of gate and up, and of down, as in `Teal`. The cutoffs are
    those of the prompt.
    """

    observed = "neurons"
    needs_open = True

    def __init__(self, config, site):
        super().__init__(config, site)
        self.cutoffs = Cutoffs(config, 2)

    def observe_inputs(self, hidden_states):
        self.cutoffs.observe(0, hidden_states)

    def observe(self, values, experts):
        self.cutoffs.observe(1, values)

    def choose(self, module):
        self.cutoffs.choose(0)
        self.cutoffs.choose(1)

    def run(self, module, hidden_states, *routing):
        tap = self._tap(module, "neurons", lambda values: self._drop(1, values))
        return super().run(tap, self._drop(0, hidden_states), *routing)

    def _drop(self, i: int, values: torch.Tensor) -> torch.Tensor:
        return values * self.cutoffs.keep(i, values.abs())

    def density(self):
        inputs, neurons = self.cutoffs.share(0), self.cutoffs.share(1)
        return None if inputs is None or neurons is None else self.site.share_read(inputs, inputs, neurons)

    share = density


def experts_class_of(method: Any, site: ExpertsSite, offloaded: bool) -> type[WholeExperts]:
    """Returns what a method, or its class, does with these experts."""
    inside = method.experts_class or WholeExperts
    if inside is FewerExperts and offloaded:
        return ResidentExperts
    return inside if site.opens or not inside.needs_open else WholeExperts


def experts_call(method: Any, site: ExpertsSite, offloaded: bool) -> WholeExperts:
    """Returns what one call of a method knows of these experts."""
    return experts_class_of(method, site, offloaded)(method.config, site)


@contextlib.contextmanager
def observing_experts(
    model: nn.Module,
    calls: list[WholeExperts],
    attention_mask: torch.Tensor | None,
    hold: Callable[[nn.Module, nn.Module], None] | None = None,
) -> Iterator[None]:
    """Within the block, hands what the dense model's experts compute in this context to those that watch it. A copy of
    the experts computes it once more, as their own forward has no place for a hook.

    Args:
        attention_mask: long [batch_size, num_new_tokens] of the tokens that will be read, or `None` without padding.
        hold: told of the experts of an offloaded model, and of what a draft has in their place, while they are loaded.
    """
    watching = [call for call in calls if call.observed is not None or isinstance(call, ResidentExperts)]
    if not watching:
        yield
        return
    me = object()
    with contextlib.ExitStack() as undo:
        undo.callback(_observer.reset, _observer.set(me))
        for call in watching:
            module, watch = call.site.module, _Watch(call, me, attention_mask)
            undo.callback(module.register_forward_pre_hook(watch.note, with_kwargs=True).remove)
            if streaming_hook(module) is None:
                undo.callback(module.register_forward_pre_hook(watch.read).remove)
            else:
                undo.enter_context(on_load(module, functools.partial(watch.read_loaded, hold)))
        with uncompiled(model):
            yield


class _Watch:
    """Hands the prefill of one block of experts over."""

    def __init__(self, call: WholeExperts, me: object, attention_mask: torch.Tensor | None):
        self.call, self.me, self.attention_mask = call, me, attention_mask
        self.num_seen = 0
        self.noted: tuple[torch.Tensor, ...] | None = None

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keeps what the experts are called with, without padding."""
        if _observer.get() is not self.me:  # another thread's forward
            return
        values = routing(args, kwargs)
        start, num_tokens = self.num_seen, len(values[0])
        self.num_seen += num_tokens
        if self.attention_mask is not None:
            batch_size, num_new_tokens = self.attention_mask.shape
            start = start // batch_size % num_new_tokens
            is_token = self.attention_mask[:, start : start + num_tokens // batch_size].flatten().bool()
            values = tuple(value[is_token.to(value.device)] for value in values)
        self.noted = values

    @torch.no_grad()
    def read(self, module: nn.Module, args: tuple = ()) -> None:
        """Hands over what is kept; `module` has the weights."""
        if self.noted is None:
            return
        (hidden_states, top_k_index, top_k_weights), self.noted = self.noted, None
        self.call.observe_routing(top_k_index, top_k_weights)
        if self.call.observed is None:
            return
        self.call.observe_inputs(hidden_states)

        def observe(values: torch.Tensor) -> torch.Tensor:
            self.call.observe(values.detach(), lambda: experts_of_pairs(tap, top_k_index))
            return values

        tap = tapped(module, self.call.observed, observe)
        tap.forward(hidden_states, top_k_index, top_k_weights)  # past its hooks, of which this is one

    def read_loaded(self, hold: Callable[[nn.Module, nn.Module], None] | None, loaded: nn.Module) -> None:
        """Does so for experts whose weights are there now alone, and has the draft take its part of them."""
        if self.noted is None:
            return
        self.read(loaded)
        if hold is not None and (held := self.call.choose(loaded)) is not None:
            hold(self.call.site.module, held)
