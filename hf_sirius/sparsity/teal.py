"""TEAL (arXiv 2408.14690): per token, the large inputs of every projection. WINA (arXiv 2505.19427) weighs them."""

import torch

from ..model.projections import projection_shape
from .base import SparsityMethod, TwinInput
from .calibrate import MagnitudeHistogram
from .in_experts import TealExperts
from .scores import InputScores


class Teal(SparsityMethod):
    """Keeps of each projection of attention and MLPs the inputs whose score reaches the projection's cutoff.

    The cutoff is the (1 - density) quantile of the scores (`InputScores`): on the calibration corpus, where with
    `budget="greedy"` each projection has a density of its own, or else over the prompt. Each leaf of a tree keeps
    inputs of its own, and its step reads what any of them keeps.
    """

    acts_on = "projections"
    observed = "inputs"
    experts_class = TealExperts
    is_masking = True  # a dropped column lies in the same cache lines as kept ones

    def __init__(self, config, sites):
        super().__init__(config, sites)
        self.cutoffs: list[float | torch.Tensor] = [0.0] * len(sites)
        if config.calibration is not None:
            self.cutoffs = config.calibration.thresholds(config.density, config.budget)
        self._histograms = [MagnitudeHistogram() for _ in sites] if self.needs_prefill() else []
        self._scores = InputScores(sites, config.weighting)  # of one call, in which the weights stay
        self._num_read: list[torch.Tensor | int] = [0] * len(sites)
        self._num_steps = [0] * len(sites)

    @classmethod
    def replacements(cls, site):
        return {site.attribute: TwinInput(site.module, site.idx)}

    def needs_prefill(self):
        return self.config.calibration is None

    def observe(self, site, values):
        self._histograms[site.idx].add(self._scores(site.idx, values))

    def choose(self, site):
        if self.needs_prefill():
            self.cutoffs[site.idx] = self._histograms[site.idx].quantile(1 - self.config.density)

    def drop(self, site_idx: int, inputs: torch.Tensor) -> torch.Tensor:
        """Zeroes the dropped inputs of a projection, [..., num_tokens, in_features]."""
        is_kept = self._scores(site_idx, inputs) >= self.cutoffs[site_idx]
        # The leaves of a level are one step; tokens of a text that is read at once are a step each.
        steps = is_kept.flatten(0, -2)
        steps = steps.any(dim=0, keepdim=True) if self.config.tree_width > 1 else steps
        self._num_read[site_idx] += steps.sum()
        self._num_steps[site_idx] += len(steps)
        return inputs * is_kept

    def num_parameters_read(self, site):
        if not self._num_steps[site.idx]:
            return None
        _, in_features = projection_shape(site.module)
        return site.num_parameters_read(float(self._num_read[site.idx]) / (self._num_steps[site.idx] * in_features))
