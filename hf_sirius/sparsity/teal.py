"""TEAL (arXiv 2408.14690): per token, the large inputs of every projection. WINA (arXiv 2505.19427) weighs them."""

import torch

from ..model.projections import projection_shape
from .base import GraphInput, SparsityMethod, TwinInput
from .cutoffs import Cutoffs
from .in_experts import TealExperts
from .scores import InputScores


class Teal(SparsityMethod):
    """Keeps of each projection of attention and MLPs the inputs whose score reaches the projection's cutoff.

    The cutoffs (`Cutoffs`) are of the scores (`InputScores`). With `budget="greedy"` each projection has a density of
    its own. Each leaf of a tree keeps inputs of its own, and its step reads what any of them keeps.
    """

    acts_on = "projections"
    observed = "inputs"
    experts_class = TealExperts
    is_masking = True  # a dropped column lies in the same cache lines as kept ones
    chooses_in_graphs = True

    def __init__(self, config, sites):
        super().__init__(config, sites)
        self.cutoffs = Cutoffs(config, len(sites), config.calibration)
        self._scores = InputScores(sites, config.weighting)  # of one call, in which the weights stay
        self._num_read: list[torch.Tensor | int] = [0] * len(sites)  # inputs, by all steps of trees
        self._num_steps = [0] * len(sites)  # of trees

    @classmethod
    def replacements(cls, site):
        return {site.attribute: TwinInput(site.module, site.idx)}

    def in_graph(self, stand_in, module, device):
        if not isinstance(stand_in, TwinInput):
            return module
        _, in_features = projection_shape(self.sites[stand_in.site_idx].module)
        self.cutoffs.prepare(stand_in.site_idx, in_features, device)
        self._scores.prepare(stand_in.site_idx, device)
        return GraphInput(self, module, stand_in.site_idx)

    def needs_prefill(self):
        return self.config.calibration is None

    def observe(self, site, values):
        self.cutoffs.observe(site.idx, self._scores(site.idx, values))

    def choose(self, site):
        if self.needs_prefill():
            self.cutoffs.choose(site.idx)

    def drop(self, site_idx: int, inputs: torch.Tensor) -> torch.Tensor:
        """Zeroes the dropped inputs of a projection, [..., num_tokens, in_features]."""
        is_kept = self.cutoffs.keep(site_idx, self._scores(site_idx, inputs))
        if self.config.tree_width > 1:  # the leaves of a level are one step
            self._num_read[site_idx] += is_kept.flatten(0, -2).any(dim=0).sum()
            self._num_steps[site_idx] += 1
        return inputs * is_kept

    def num_parameters_read(self, site):
        share = self.cutoffs.share(site.idx)
        if share is not None and self.config.tree_width > 1:
            _, in_features = projection_shape(site.module)
            share = float(self._num_read[site.idx]) / (self._num_steps[site.idx] * in_features)
        return None if share is None else site.num_parameters_read(share)
