"""CATS (arXiv 2404.08763): per token, the neurons whose |act(gate_proj x)| is large. FSparse in the Sirius paper."""

import torch
from torch import nn

from ..model.sites import MlpSite, part_of
from ..weights.draft_modules import TwinModule, run_in_draft
from ..weights.linear import plain_over, read_needed, reads_needed
from .base import GraphActivation, GraphPart, SparsityMethod, TwinActivation, drafting_method
from .cutoffs import Cutoffs
from .in_experts import CatsExperts


class Cats(SparsityMethod):
    """Keeps a token's neurons whose |act(gate_proj x)| exceeds their layer's threshold, or the largest (`"topk"`).

    The threshold is the layer's cutoff (`Cutoffs`). All of gate_proj must be read to find the neurons; of up and down
    only the kept ones are needed. Those of up are read alone where a kernel can (a CPU, with numba). Of down they are
    numbers in each row, beside dropped ones in the same cache lines, so all of it is read.
    """

    observed = "activation"
    experts_class = CatsExperts
    chooses_in_graphs = True

    def __init__(self, config, sites):
        super().__init__(config, sites)
        self.cutoffs = Cutoffs(config, len(sites), config.calibration)
        self._latest_masks: list[torch.Tensor | None] = [None] * len(sites)
        self._has_up = [site.up is not None for site in sites]
        # Tokens at all MLPs, and those that dropped rows of up unread, long []: a number would be constant in a graph.
        self._num_dropping, self._num_skipping = (torch.zeros((), dtype=torch.long, device="cpu") for _ in range(2))

    @classmethod
    def replacements(cls, site):
        if not site.activation:
            raise ValueError(
                f"the activation of {site.name} is no module or function of its own, in whose place cats could drop "
                "neurons: use method='griffin' or 'teal'"
            )
        parts: dict[str, nn.Module] = {site.activation: TwinActivation(part_of(site.owner, site.activation), site.idx)}
        if site.up is not None:
            parts |= {name: _MlpProjection(site, name) for name in site.part_names}
        return parts

    @property
    def is_masking(self):
        masks_experts = any(isinstance(call, CatsExperts) for call in self.experts)
        return masks_experts or bool(self._num_dropping > 2 * self._num_skipping)

    def in_graph(self, stand_in, module, device):
        if isinstance(stand_in, TwinActivation):
            self.cutoffs.prepare(stand_in.site_idx, self.sites[stand_in.site_idx].num_neurons, device)
            return GraphActivation(self, module, stand_in.site_idx)
        if isinstance(stand_in, _MlpProjection):
            return _GraphProjection(self, module, stand_in)
        return module

    def needs_prefill(self):
        return self.config.selection == "threshold" and self.config.calibration is None

    def observe(self, site, values):
        self.cutoffs.observe(site.idx, values)

    def choose(self, site):
        if self.needs_prefill():
            self.cutoffs.choose(site.idx)

    def drop(self, site_idx: int, activations: torch.Tensor) -> torch.Tensor:
        """Zeroes the dropped neurons of act(gate_proj x), [..., num_tokens, num_neurons].

        The leaves of one level of a tree share one set of neurons, by the sum of their magnitudes (as in the paper; by
        the mean, against a threshold): with a set for each, a step would read most of the weights.
        """
        magnitudes = activations.abs()
        if self.config.tree_width > 1:
            magnitudes = magnitudes.mean(dim=-2, keepdim=True)
        neuron_mask = self.cutoffs.keep(site_idx, magnitudes)
        self._num_dropping.add_(activations[..., 0].numel())
        if self._has_up[site_idx]:
            self._latest_masks[site_idx] = neuron_mask
        return activations * neuron_mask

    def num_parameters_read(self, site: MlpSite) -> float | None:
        share = self.cutoffs.share(site.idx)
        return None if share is None else site.num_parameters_read(share, gate_in_full=True)

    def run(self, site_idx: int, is_up: bool, projection: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the outputs of a projection, of up those of the neurons that were kept just before."""
        is_needed = self.take_needed(site_idx)
        if is_up and is_needed is not None:
            outputs = read_needed(projection, inputs, is_needed)
            if outputs is not None:
                self.note_skipped(inputs)
                return outputs
        return run_in_draft(projection, inputs)

    def take_needed(self, site_idx: int) -> torch.Tensor | None:
        """Returns which neurons any of the latest tokens keeps, bool [num_neurons], and forgets them: gate and down do
        so as well, so that up never takes another token's, in whatever order an MLP runs. `None` where there are none.
        """
        neuron_mask, self._latest_masks[site_idx] = self._latest_masks[site_idx], None
        return None if neuron_mask is None else neuron_mask.flatten(0, -2).any(dim=0)

    def note_skipped(self, inputs: torch.Tensor) -> None:
        """Takes note of tokens, [..., in_features], that left rows of up unread."""
        self._num_skipping.add_(inputs[..., 0].numel())


class _MlpProjection(TwinModule):
    """Stands in for a projection of an MLP in the twin: the drafting method runs it."""

    def __init__(self, site: MlpSite, name: str):
        super().__init__(part_of(site.owner, name))
        self.site_idx, self.is_up = site.idx, name == site.kind.up

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        method = drafting_method()
        if method is None:
            return super().forward(inputs)
        return method.run(self.site_idx, self.is_up, self.current(), inputs)


class _GraphProjection(GraphPart):
    """Stands in a compiled step, which reads one token, for a projection of an MLP."""

    def __init__(self, method: Cats, module: nn.Module, stand_in: _MlpProjection):
        super().__init__(method, module, stand_in.site_idx)
        self.skips = stand_in.is_up and reads_needed(module, 1)
        if self.skips and type(module) is nn.Linear:  # such as a copy without accelerate's hook
            self.module = plain_over(module)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        is_needed = self.method.take_needed(self.site_idx)
        if not self.skips or is_needed is None:
            return self.module(inputs)
        self.method.note_skipped(inputs)
        return self.module(inputs, is_needed)
