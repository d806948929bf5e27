"""CATS (arXiv 2404.08763): per token, the neurons whose |act(gate_proj x)| is large. FSparse in the Sirius paper."""

import torch
from torch import nn

from ..model.sites import MlpSite, part_of
from ..weights.draft_modules import TwinModule, run_in_draft
from ..weights.linear import read_rows
from .base import SparsityMethod, TwinActivation, drafting_method
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

    def __init__(self, config, sites):
        super().__init__(config, sites)
        self.cutoffs = Cutoffs(config, len(sites), config.calibration)
        self._latest_masks: list[torch.Tensor | None] = [None] * len(sites)
        self._num_dropping = self._num_skipping = 0  # tokens at all MLPs, and those that dropped rows of up unread

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
        return masks_experts or self._num_dropping > 2 * self._num_skipping

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
        self._num_dropping += activations[..., 0].numel()
        self._latest_masks[site_idx] = neuron_mask
        return activations * neuron_mask

    def num_parameters_read(self, site: MlpSite) -> float | None:
        share = self.cutoffs.share(site.idx)
        return None if share is None else site.num_parameters_read(share, gate_in_full=True)

    def run(self, site_idx: int, is_up: bool, projection: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the outputs of a projection, of up those of the neurons that were kept just before."""
        # Gate and down forget them, so that up never takes another token's, in whatever order an MLP runs.
        neuron_mask, self._latest_masks[site_idx] = self._latest_masks[site_idx], None
        if is_up and neuron_mask is not None:
            rows = neuron_mask.flatten(0, -2).any(dim=0).nonzero().flatten()
            outputs = read_rows(projection, inputs, rows)
            if outputs is not None:
                self._num_skipping += inputs[..., 0].numel()
                return outputs
        return run_in_draft(projection, inputs)


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
