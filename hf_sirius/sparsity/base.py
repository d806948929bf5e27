"""The base of the sparsity methods: what one call knows about the neurons, and how a twin's modules ask for it.

A method object lives as long as one `generate` call. During the prefill it observes the dense model; while it is
*drafting*, the twin's activations find it in a context variable and drop neurons. At all other times they compute
densely. So two calls on one twin, in two threads, do not mix.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.experts import routing
from ..model.observation import Observed, observing
from ..model.projections import is_opaque, is_projection
from ..model.sites import MlpSite, ProjectionSite, decoder_modules, num_parameters
from ..settings.config import SiriusConfig
from ..weights.draft_modules import TwinModule, TwinProjection
from ..weights.formats import num_elements
from ..weights.shortlist import SHORTLIST, num_read
from .cutoffs import Cutoffs


_drafting: ContextVar["SparsityMethod | None"] = ContextVar("hf_sirius_drafting", default=None)


def drafting_method() -> Any:
    """Returns the method that drafts in this context, or `None` outside of drafts."""
    return _drafting.get()


class SparsityMethod(ABC):
    """Chooses the neurons of one call. A subclass declares what it observes and replaces, and says how it chooses.

    Args:
        config: the settings of the twin.
        sites: the MLPs of the dense model, or its projections: what the method acts on.

    Attributes:
        acts_on: which of the two.
        experts_class: what it does within a mixture's experts, a [`WholeExperts`]; `None` leaves them whole.
        experts: that, for each block of experts.
        is_steady: whether it chooses nothing anew for every token.
        chooses_in_graphs: whether a compiled step can have it choose, by what `in_graph` returns.
        observed: what `observe` is given.
        gathers: whether the neurons that it keeps are copied, once they are chosen: those of `neuron_indices`.
        cutoffs: `Cutoffs` of cats and teal, `None` of others.
        is_masking: whether its draft steps computed all of what they dropped as well, and saved no time by it.
        neuron_indices: of a method that gathers, long [num_kept] for each MLP, ascending; `None` before the choice.
    """

    acts_on: ClassVar[Literal["mlps", "projections"]] = "mlps"
    experts_class: ClassVar[Any] = None
    is_steady: ClassVar[bool] = False
    chooses_in_graphs: ClassVar[bool] = False
    observed: ClassVar[Observed]
    gathers: ClassVar[bool] = False
    cutoffs: Cutoffs | None = None
    is_masking: bool = False

    def __init__(self, config: SiriusConfig, sites: list[MlpSite] | list[ProjectionSite]):
        self.config = config
        self.sites = sites
        self.experts: list[Any] = []
        self.neuron_indices: list[torch.Tensor | None] = [None] * len(sites)
        self._has_acted = False

    def check_acted(self, model: PreTrainedModel) -> None:
        """Raises `RuntimeError` if a draft step has passed the method by, as whole MLPs do that are one kernel.

        Args:
            model: the dense model.
        """
        if self._has_acted:
            return
        read = [*map(self.num_parameters_read, self.sites), *(call.num_parameters_read() for call in self.experts)]
        if all(of_site is None for of_site in read):
            raise RuntimeError(
                f"method={self.config.method!r} was asked for, and a draft step of this {type(model).__name__} has "
                "passed it by: a forward was laid over its MLPs that does not call their parts, as fused kernels are. "
                "Load the model without them, or use density=1.0 with a draft_dtype"
            )
        self._has_acted = True

    @classmethod
    def replacements(cls, site: MlpSite) -> dict[str, nn.Module]:
        """Returns the attributes of the site's owner that the twin replaces, maybe dotted, and by what. They are shared
        by all calls.

        Raises `ValueError` for a site at which this method cannot act.
        """
        return {}

    def in_graph(self, stand_in: nn.Module, module: Any, device: torch.device) -> Any:
        """Returns what a compiled step has in place of a stand-in of the twin's, which cannot ask there which method
        drafts.

        Args:
            module: what the draft reads there: a module, or the function that an activation is.
            device: that of the tokens, and of all that the step reads.
        """
        return module

    @abstractmethod
    def observe(self, site: MlpSite, values: torch.Tensor) -> None:
        """Takes in some of the prefill's values of one site, without padding: [num_tokens, num_neurons] of an MLP,
        [num_tokens, in_features] of a projection.
        """

    @abstractmethod
    def choose(self, site: MlpSite) -> None:
        """Chooses what is chosen of one site once per prompt, from what was observed so far."""

    def num_parameters_read(self, site: MlpSite) -> float | None:
        """Returns how many of this site's parameters a draft step needs, on average so far; `None` before it is known.
        Here those of the gathered neurons.
        """
        neuron_indices = self.neuron_indices[site.idx]
        if neuron_indices is None:
            return None
        return site.num_parameters_read(len(neuron_indices) / site.num_neurons, gate_in_full=False)

    def draft_density(self, model: PreTrainedModel) -> float | None:
        """Returns the parameters that a draft step needed / all parameters, or `None` before the first step.

        Of an embedding one row is read, unless the head is tied to it: the head is read whole. What no draft step
        passes, such as a vision tower or an encoder, does not count, nor do the experts that a step of the dense model
        passes by.
        """
        read = [self.num_parameters_read(site) for site in self.sites]
        of_experts = [call.num_parameters_read() for call in self.experts]
        if None in read or None in of_experts:
            return None
        head, decoder = model.get_output_embeddings(), decoder_modules(model)
        head_parameters = _num_parameters_of(head.modules()) if head is not None else {}
        unread = sum(
            module.weight.numel() - module.weight.shape[-1]
            for module in decoder
            if isinstance(module, nn.Embedding) and id(module.weight) not in head_parameters
        )
        num_all = sum((_num_parameters_of(decoder) | head_parameters).values())
        embedding = model.get_input_embeddings()
        is_tied = head is not None and getattr(model.config.get_text_config(), "tie_word_embeddings", False)
        if is_tied and not is_opaque(head) and head.weight.is_meta and id(embedding.weight) not in head_parameters:
            # Offloaded, they are two parameters of one and the same weight.
            unread -= embedding.weight.numel() - embedding.weight.shape[-1]
            num_all -= head.weight.numel()
        if self.config.draft_head == SHORTLIST:
            unread += head.weight.numel() - num_read(head)
        at_sites = sum(site.num_parameters() for site in self.sites)
        routed = sum(call.num_parameters_routed() for call in self.experts)
        num_all -= sum(call.site.num_parameters() for call in self.experts) - routed
        return (num_all - unread - at_sites - routed + sum(read) + sum(of_experts)) / num_all

    def needs_prefill(self) -> bool:
        """Whether `observe` must be fed during the prefill."""
        return True

    def observing(
        self, model: nn.Module, attention_mask: torch.Tensor | None
    ) -> contextlib.AbstractContextManager[None]:
        """Within the block, what the dense model computes at the sites in this context goes to `observe`, if needed.

        Args:
            model: the dense model.
            attention_mask: long [batch_size, num_new_tokens] of the prefill's tokens, or `None` without padding.
        """
        if not self.needs_prefill():
            return contextlib.nullcontext()
        return observing(model, self.sites, self.observed, self.observe, attention_mask)

    @contextlib.contextmanager
    def drafting(self) -> Iterator[None]:
        """Within the block, forwards of the twin in this context are sparse."""
        for cutoffs in (self.cutoffs, *(call.cutoffs for call in self.experts)):
            if cutoffs is not None:
                cutoffs.follow()
        token = _drafting.set(self)
        try:
            yield
        finally:
            _drafting.reset(token)


def _num_parameters_of(modules: Iterable[nn.Module]) -> dict[int, int]:
    """Returns how many numbers the own parameters of modules stand for, by the id of what may be tied."""
    counts = {}
    for module in modules:
        if is_projection(module) and is_opaque(module):  # whose tensors do not tell
            counts[id(module._parameters.get("weight", module))] = num_parameters(module)
        else:
            for p in module._parameters.values():
                if p is not None:
                    counts[id(p)] = num_elements(p)
    return counts


class TwinExperts(TwinModule):
    """Stands in for the experts of a block in the twin: the drafting method runs them."""

    def __init__(self, dense: nn.Module, site_idx: int):
        super().__init__(dense)
        self.site_idx = site_idx

    def forward(self, *args, **kwargs):
        method = drafting_method()
        if method is None:
            return super().forward(*args, **kwargs)
        return method.experts[self.site_idx].run(self.current(), *routing(args, kwargs))


class TwinInput(TwinProjection):
    """Stands in for a projection in the twin: the drafting method zeroes the inputs that it drops."""

    def __init__(self, dense: nn.Module, site_idx: int):
        super().__init__(dense)
        self.site_idx = site_idx

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        method = drafting_method()
        return super().forward(inputs if method is None else method.drop(self.site_idx, inputs))


class TwinActivation(nn.Module):
    """Stands in for an activation function in the twin: the drafting method zeroes the neurons that it drops."""

    def __init__(self, dense, site_idx: int):
        super().__init__()
        self.__dict__["dense"] = dense
        self.site_idx = site_idx

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        activations = self.dense(values)
        method = drafting_method()
        return activations if method is None else method.drop(self.site_idx, activations)


class GraphPart(nn.Module):
    """Stands in a compiled step where a method's own stand-in does in the twin.

    Args:
        method: that drafts.
        module: what the draft reads there.
        site_idx: the site's place.
    """

    def __init__(self, method: SparsityMethod, module: Any, site_idx: int):
        super().__init__()
        self.method, self.module, self.site_idx = method, module, site_idx


class GraphActivation(GraphPart):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.method.drop(self.site_idx, self.module(values))


class GraphInput(GraphPart):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.module(self.method.drop(self.site_idx, inputs))
