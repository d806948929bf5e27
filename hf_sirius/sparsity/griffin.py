"""GRIFFIN (arXiv 2404.01365): one set of neurons per prompt, from the prefill's activations. CSparse in the Sirius
paper.
"""

import contextlib

import torch
from torch import nn

from ..mlp import PROJECTIONS, MlpSite, projection_shape
from ..quantization import changes, draft_linear, native_products, num_kept_neurons
from .base import SparsityMethod, TwinModule


class Griffin(SparsityMethod):
    """Keeps the neurons with the largest prompt statistic, gathered once into smaller projections.

    The statistic of neuron j is the norm over the prompt's tokens of its share in each token's activations:
    s_j = || z_j / ||z|| ||_2 with z the input of the down projection (GRIFFIN, section 4.2). What is observed after the
    prefill adds to it.
    """

    observed = "neurons"
    gathers = True

    def __init__(self, config, sites):
        super().__init__(config, sites)
        self._statistics: list[torch.Tensor | None] = [None] * len(sites)
        self.neuron_indices: list[torch.Tensor | None] = [None] * len(sites)

    @classmethod
    def replacements(cls, site):
        names = [name for name in (site.kind.gate, site.kind.up, site.kind.down) if name]
        hidden_size, _ = projection_shape(site.down)
        for name, child in site.owner.named_children():
            if name in names or site.num_neurons == hidden_size:
                continue
            if any(p.shape == (site.num_neurons,) for p in child.parameters()):
                raise ValueError(
                    f"{site.name}.{name} works on all {site.num_neurons} neurons together, so a share of them cannot "
                    "be gathered: use method='cats' for this model"
                )
        return {name: TwinModule(getattr(site.owner, name)) for name in names}

    def observe(self, site, values):
        dtype = torch.promote_types(values.dtype, torch.float32)
        norms = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=dtype).clamp_min(1e-12)
        energy = (values / norms).square_().sum(dim=0)
        seen = self._statistics[site.idx]
        self._statistics[site.idx] = energy if seen is None else seen + energy

    def select(self):
        for site in self.sites:
            self.choose(site)
            for part in site.parts:
                if not part.weight.is_meta:  # else it was gathered while it was loaded
                    self.gather(site, part, part)

    @contextlib.contextmanager
    def drafting(self):
        weights = (parameter for module in self.held.values() for parameter in module.parameters())
        on_cpu = any(weight.dtype == torch.bfloat16 and weight.device.type == "cpu" for weight in weights)
        # The leaves of a level are several tokens, which oneDNN is there for.
        is_native = on_cpu and self.config.tree_width == 1
        with super().drafting(), native_products() if is_native else contextlib.nullcontext():
            yield

    def choose(self, site: MlpSite) -> None:
        """Chooses the neurons of one MLP, from what was observed so far."""
        num_kept = num_kept_neurons(self.config.density, site.num_neurons, self.config.draft_dtype)
        self.neuron_indices[site.idx] = self._statistics[site.idx].topk(num_kept).indices.sort().values

    @torch.no_grad()
    def gather(self, site: MlpSite, part: nn.Module, loaded: nn.Module) -> None:
        """Takes the chosen neurons of a projection of the dense model.

        Args:
            site: the MLP.
            part: its gate, up or down projection.
            loaded: the same with its weights, where they are elsewhere (offloaded).
        """
        neuron_indices = self.neuron_indices[site.idx]
        draft_dtype = self.config.draft_dtype
        if len(neuron_indices) == site.num_neurons and not changes(part, draft_dtype) and loaded is part:
            return  # every neuron is kept as it is
        if part is site.down:
            rows, columns = None, neuron_indices
        else:
            num_fused = projection_shape(part)[0] // site.num_neurons
            rows = torch.cat([neuron_indices + i * site.num_neurons for i in range(num_fused)])
            columns = None
        self.held[part] = draft_linear(
            loaded, draft_dtype, rows, columns, compute_dtype=part.weight.dtype, memory=self.memory.get(part)
        )

    @torch.no_grad()
    def hold(self, module: nn.Module, loaded: nn.Module) -> None:
        """Takes an offloaded module outside the MLPs, cast if `draft_scope` says so; `loaded` as in `gather`."""
        is_cast = self.config.draft_scope == "all" and isinstance(module, PROJECTIONS)
        if is_cast and changes(module, self.config.draft_dtype):
            loaded = draft_linear(loaded, self.config.draft_dtype, compute_dtype=module.weight.dtype)
        self.held[module] = loaded

    def num_parameters_read(self, site: MlpSite) -> float | None:
        neuron_indices = self.neuron_indices[site.idx]
        if neuron_indices is None:
            return None
        return site.num_parameters_read(len(neuron_indices) / site.num_neurons, gate_in_full=False)
