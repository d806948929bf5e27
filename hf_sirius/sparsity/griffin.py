"""GRIFFIN (arXiv 2404.01365): one set of neurons per prompt, from the prefill's activations. CSparse in the Sirius
paper.
"""

import torch
from torch import nn

from ..mlp import MlpSite, neuron_weight
from .base import SparsityMethod, TwinProjection


class Griffin(SparsityMethod):
    """Keeps the neurons with the largest prompt statistic, gathered once into smaller projections.

    The statistic of neuron j is the norm over the prompt's tokens of its share in each token's activations:
    s_j = || z_j / ||z|| ||_2 with z the input of the down projection (GRIFFIN, section 4.2). The gathered weights
    belong to this object and are freed with it, at the end of the call.
    """

    observed = "neurons"

    def __init__(self, config, sites, projections=()):
        super().__init__(config, sites, projections)
        self._statistics: list[torch.Tensor | None] = [None] * len(sites)
        self.neuron_indices: list[torch.Tensor] = []
        self._dtype = getattr(torch, config.draft_dtype) if config.draft_dtype else None
        self._gathered: dict[nn.Module, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @classmethod
    def replacements(cls, site):
        names = [name for name in (site.kind.gate, site.kind.up, site.kind.down) if name]
        hidden_size = neuron_weight(site.down).shape[0]
        for name, child in site.owner.named_children():
            if name in names or site.num_neurons == hidden_size:
                continue
            if any(p.shape == (site.num_neurons,) for p in child.parameters()):
                raise ValueError(
                    f"{site.name}.{name} works on all {site.num_neurons} neurons together, so a share of them cannot "
                    "be gathered: use method='cats' for this model"
                )
        return {name: TwinProjection(getattr(site.owner, name)) for name in names}

    def observe(self, site, values):
        shares = nn.functional.normalize(values.float() if values.dtype != torch.float64 else values, dim=-1)
        energy = shares.square().sum(dim=0)
        seen = self._statistics[site.idx]
        self._statistics[site.idx] = energy if seen is None else seen + energy

    @torch.no_grad()
    def select(self):
        for site, statistic in zip(self.sites, self._statistics, strict=True):
            num_kept = max(1, round(self.config.density * site.num_neurons))
            neuron_indices = statistic.topk(num_kept).indices.sort().values
            self.neuron_indices.append(neuron_indices)
            if num_kept == site.num_neurons and self._dtype is None:
                continue
            for part in (site.gate, site.up):
                if part is not None:
                    rows = _gather_rows(part, neuron_indices, site.num_neurons)
                    self._gathered[part] = _cast(rows, self._dtype)
            down = site.down
            columns = neuron_indices.to(down.weight.device)
            gathered = (neuron_weight(down).index_select(1, columns), down.bias)
            self._gathered[down] = _cast(gathered, self._dtype)
        for projection in self.projections:
            self._gathered[projection] = _cast((neuron_weight(projection), projection.bias), self._dtype)
        self._statistics = []

    def project(self, projection: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the gathered rows (or columns, for down) of a projection of the dense model."""
        gathered = self._gathered.get(projection)
        if gathered is None:  # every neuron is kept
            return projection(hidden_states)
        weight, bias = gathered
        return nn.functional.linear(hidden_states.to(weight.dtype), weight, bias).to(hidden_states.dtype)

    def num_parameters_read(self, site: MlpSite) -> float | None:
        if not self.neuron_indices:
            return None
        share = len(self.neuron_indices[site.idx]) / site.num_neurons
        return site.num_parameters_read(share, gate_in_full=False)


def _cast(gathered: tuple[torch.Tensor, torch.Tensor | None], dtype: torch.dtype | None):
    return tuple(part if part is None or dtype is None else part.to(dtype) for part in gathered)


def _gather_rows(
    projection: nn.Module, neuron_indices: torch.Tensor, num_neurons: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (weight, bias) with the neurons' rows, of each part of a fused projection."""
    weight = neuron_weight(projection)
    rows = neuron_indices.to(weight.device)
    rows = torch.cat([rows + start for start in range(0, weight.shape[0], num_neurons)])
    bias = projection.bias.index_select(0, rows) if projection.bias is not None else None
    return weight.index_select(0, rows), bias
