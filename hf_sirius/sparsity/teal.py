"""TEAL (arXiv 2408.14690): per token, the large inputs of every projection. WINA (arXiv 2505.19427) weighs them."""

import torch

from ..model.sites import projection_shape
from ..weights.formats import dense_weight
from .base import SparsityMethod, TwinInput
from .calibrate import MagnitudeHistogram


class Teal(SparsityMethod):
    """Keeps of each projection of attention and MLPs the inputs whose score reaches the projection's cutoff.

    The score of input j is |x_j| (TEAL, section 4), or with `weighting="column"` |x_j| * ||W[:, j]||_2 (WINA, section
    3.2): how much it can add to the outputs. The cutoff is the (1 - density) quantile of the scores over the prompt.
    Each leaf of a tree has inputs of its own.
    """

    acts_on = "projections"
    observed = "inputs"

    def __init__(self, config, sites):
        super().__init__(config, sites)
        self._histograms = [MagnitudeHistogram() for _ in sites]
        self._cutoffs: list[torch.Tensor | None] = [None] * len(sites)
        self._norms: list[torch.Tensor | None] = [None] * len(sites)
        self._num_kept: list[torch.Tensor | int] = [0] * len(sites)
        self._num_seen = [0] * len(sites)

    @classmethod
    def replacements(cls, site):
        return {site.attribute: TwinInput(site.module, site.idx)}

    def observe(self, site, values):
        self._histograms[site.idx].add(self._scores(site.idx, values))

    def choose(self, site):
        self._cutoffs[site.idx] = self._histograms[site.idx].quantile(1 - self.config.density)

    def _scores(self, site_idx: int, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the scores of inputs [..., in_features], in float32 or wider."""
        scores = inputs.abs().to(torch.promote_types(inputs.dtype, torch.float32))
        if self.config.weighting == "magnitude":
            return scores
        if self._norms[site_idx] is None:  # once per call, in which the weights stay
            self._norms[site_idx] = _column_norms(self.sites[site_idx].module)
        return scores * self._norms[site_idx].to(scores)

    def drop(self, site_idx: int, inputs: torch.Tensor) -> torch.Tensor:
        """Zeroes the dropped inputs of a projection, [..., num_tokens, in_features]."""
        is_kept = self._scores(site_idx, inputs) >= self._cutoffs[site_idx]
        self._num_kept[site_idx] += is_kept.sum()
        self._num_seen[site_idx] += is_kept.numel()
        return inputs * is_kept

    def num_parameters_read(self, site):
        if not self._num_seen[site.idx]:
            return None
        return site.num_parameters_read(float(self._num_kept[site.idx]) / self._num_seen[site.idx])


def _column_norms(projection: torch.nn.Module) -> torch.Tensor:
    """Returns the norm of each column of a weight, [in_features], in float32 or wider."""
    if projection.weight.is_meta:
        raise ValueError(
            f"weighting='column' reads the whole weight of a projection ({projection_shape(projection)}), which is "
            "offloaded: use weighting='magnitude'"
        )
    weight = dense_weight(projection)
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.promote_types(weight.dtype, torch.float32))
