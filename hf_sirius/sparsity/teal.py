"""TEAL (arXiv 2408.14690): per token, the large inputs of every projection. WINA (arXiv 2505.19427) weighs them."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..model.accelerate_hooks import streaming_hook
from ..model.sites import projection_shape
from ..weights.formats import dense_weight
from .base import SparsityMethod, TwinInput
from .calibrate import MagnitudeHistogram


class Teal(SparsityMethod):
    """Keeps of each projection of attention and MLPs the inputs whose score reaches the projection's cutoff.

    The score of input j is |x_j| (TEAL, section 4), or with `weighting="column"` |x_j| * ||W[:, j]||_2 (WINA, section
    3.2): how much it can add to the outputs. The cutoff is the (1 - density) quantile of the scores over the prompt.
    Each leaf of a tree keeps inputs of its own, and its step reads what any of them keeps.
    """

    acts_on = "projections"
    observed = "inputs"
    is_masking = True  # a dropped column lies in the same cache lines as kept ones

    def __init__(self, config, sites):
        super().__init__(config, sites)
        self._histograms = [MagnitudeHistogram() for _ in sites]
        self._cutoffs: list[torch.Tensor | None] = [None] * len(sites)
        self._norms: list[torch.Tensor | None] = [None] * len(sites)
        self._num_read: list[torch.Tensor | int] = [0] * len(sites)
        self._num_steps = [0] * len(sites)

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
            self._norms[site_idx] = _column_norms(self.sites[site_idx].module).to(scores)
        return scores * self._norms[site_idx]

    def drop(self, site_idx: int, inputs: torch.Tensor) -> torch.Tensor:
        """Zeroes the dropped inputs of a projection, [..., num_tokens, in_features]."""
        is_kept = self._scores(site_idx, inputs) >= self._cutoffs[site_idx]
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


def _column_norms(projection: nn.Module) -> torch.Tensor:
    """Returns the norm of each column of a weight, [in_features], in float32 or wider."""
    weight = dense_weight(projection)
    if weight.is_meta:  # offloaded, and loaded only after its inputs are seen
        weight = streaming_hook(projection).weights_map["weight"]
        weight = weight.T if isinstance(projection, Conv1D) else weight
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.promote_types(weight.dtype, torch.float32))
