"""How much each input of a projection counts: what teal compares while it drafts, and `calibrate` measures for it."""

import torch
from torch import nn

from ..model.accelerate_hooks import streamed_weight
from ..model.sites import ProjectionSite
from ..weights.formats import dense_weight


class InputScores:
    """Scores inputs of projections while their weights stay as they are.

    The score of input j is |x_j| (TEAL, arXiv 2408.14690, section 4), or with `weighting="column"`
    |x_j| * ||W[:, j]||_2 (WINA, arXiv 2505.19427, section 3.2): how much it can add to the outputs.
    """

    def __init__(self, sites: list[ProjectionSite], weighting: str):
        self.sites = sites
        self.weighting = weighting
        self._norms: list[torch.Tensor | None] = [None] * len(sites)

    def __call__(self, site_idx: int, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the scores of inputs [..., in_features], in float32 or wider."""
        scores = inputs.abs().to(torch.promote_types(inputs.dtype, torch.float32))
        if self.weighting == "magnitude":
            return scores
        if self._norms[site_idx] is None:
            self.prepare(site_idx, scores.device)
        return scores * self._norms[site_idx].to(scores)

    def prepare(self, site_idx: int, device: torch.device) -> None:
        """Has the norms of a projection's columns on a device, if they count. A graph is to find them there."""
        if self.weighting != "magnitude" and self._norms[site_idx] is None:
            self._norms[site_idx] = _column_norms(self.sites[site_idx].module).to(device)


def _column_norms(projection: nn.Module) -> torch.Tensor:
    """Returns the norm of each column of a weight, [in_features], in float32 or wider."""
    weight = dense_weight(projection)
    if weight.is_meta:  # offloaded, and loaded only after its inputs are seen
        weight = streamed_weight(projection)
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.promote_types(weight.dtype, torch.float32))
