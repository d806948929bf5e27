"""GRIFFIN (arXiv 2404.01365): one set of neurons per prompt, from its activations. CSparse in the Sirius paper."""

import torch
from torch import nn

from ..model.projections import is_projection, projection_shape
from ..weights.formats import num_kept_neurons
from .base import SparsityMethod
from .in_experts import GriffinExperts


class Griffin(SparsityMethod):
    """Keeps the neurons with the largest prompt statistic, gathered once into smaller projections.

    The statistic of neuron j is the norm over the prompt's tokens of its share in each token's activations:
    s_j = || z_j / ||z|| ||_2 with z the input of the down projection (GRIFFIN, section 4.2). What is observed after the
    prefill adds to it.
    """

    is_steady = True
    observed = "neurons"
    experts_class = GriffinExperts
    gathers = True

    def __init__(self, config, sites):
        super().__init__(config, sites)
        self._statistics: list[torch.Tensor | None] = [None] * len(sites)

    @classmethod
    def replacements(cls, site):
        hidden_size, _ = projection_shape(site.down)
        gate_features, _ = projection_shape(site.gate)
        in_parts = {inner for part in site.parts for inner in part.modules()}
        for name, inner in site.owner.named_modules():
            if is_projection(inner) or inner in in_parts or site.num_neurons == hidden_size:
                continue
            if any(p.shape == (site.num_neurons,) for p in inner.parameters(recurse=False)):
                raise ValueError(
                    f"{site.name}.{name} works on all {site.num_neurons} neurons together, so a share of them cannot "
                    "be gathered: use method='cats' for this model"
                )
            # Zamba2 adapts a block that several layers share.
            in_lists = inner.modules() if isinstance(inner, nn.ModuleList) else ()
            if any(is_projection(part) and projection_shape(part)[0] == gate_features for part in in_lists):
                raise ValueError(
                    f"{site.name}.{name} adds to what {site.kind.gate} makes, which cannot be gathered: use "
                    "method='cats' for this model"
                )
        return {}  # what is gathered takes its place as all draft weights do

    def observe(self, site, values):
        dtype = torch.promote_types(values.dtype, torch.float32)
        norms = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=dtype).clamp_min(1e-12)
        energy = (values / norms).square_().sum(dim=0)
        seen = self._statistics[site.idx]
        self._statistics[site.idx] = energy if seen is None else seen + energy

    def choose(self, site):
        num_kept = num_kept_neurons(self.config.density, site.num_neurons, self.config.draft_dtype)
        self.neuron_indices[site.idx] = self._statistics[site.idx].topk(num_kept).indices.sort().values
