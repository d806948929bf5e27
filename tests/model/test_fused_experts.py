"""How the parameters of experts lie: what is gathered and tapped against experts computed by hand."""

import pytest
import torch
from mixtures import available_mixtures, tiny_mixture

from hf_sirius.model.experts import find_experts, gathered, neuron_norms, tapped


# concatenated, interleaved and transposed with biases, transposed
LAYOUTS = [family for family in ("mixtral", "gpt_oss", "aria_text") if family in available_mixtures()]


def first_experts(family, **fields):
    model = tiny_mixture(family, **fields)
    return find_experts(model, set(model.get_decoder().modules()))[0][0]


def inputs_of(site):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 32, dtype=torch.float64, generator=generator)
    top_k_index = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(5)])
    return hidden, top_k_index, torch.rand(5, 2, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("family", LAYOUTS)
@torch.no_grad()
def test_gathered_neurons_compute_what_is_left_where_the_others_are_zeroed(family, implementation):
    site = first_experts(family, implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    kept = torch.stack([torch.randperm(site.num_neurons, generator=generator)[:7].sort().values for _ in range(6)])
    smaller = gathered(site, site.module, kept)
    assert smaller.down_proj.numel() < site.module.down_proj.numel()
    mask = torch.zeros(6, site.num_neurons, dtype=torch.float64).scatter_(1, kept, 1.0)
    hidden, top_k_index, weights = inputs_of(site)
    experts = top_k_index.flatten()
    site.module.config._experts_implementation_internal = "batched_mm"  # whose pairs lie in order
    masked = tapped(site.module, "neurons", lambda neurons: neurons * mask[experts])
    torch.testing.assert_close(smaller(hidden, top_k_index, weights), masked(hidden, top_k_index, weights))


@pytest.mark.parametrize("family", LAYOUTS)
@torch.no_grad()
def test_a_neuron_without_weights_has_the_least_norm(family):
    site = first_experts(family)
    down = site.module.down_proj
    (down[2, 5] if site.module.is_transposed else down[2, :, 5]).zero_()
    norms = neuron_norms(site, site.module)
    assert norms.shape == (6, site.num_neurons) and norms[2].argmin() == 5 and norms[2, 5] == 0
    gate = site.module.gate_up_proj
    place = 3 if site.module.is_concatenated else 6  # the gate's row of neuron 3
    (gate[1, :, place] if site.module.is_transposed else gate[1, place]).mul_(100)
    assert neuron_norms(site, site.module)[1].argmax() == 3


@torch.no_grad()
def test_the_share_of_an_expert_against_a_count_by_hand():
    site = first_experts("mixtral")
    num_neurons = site.num_neurons
    assert site.num_parameters() == 6 * 3 * 32 * num_neurons
    assert site.share_read(1.0, 0.5, 0.5) == pytest.approx(2 / 3)
    assert site.share_read(0.5, 0.5, 0.5) == pytest.approx(0.5)


def test_dense_layers_and_shared_experts_are_no_experts():
    model = tiny_mixture("deepseek_v3")
    sites, others = find_experts(model, set(model.get_decoder().modules()))
    assert [site.name for site in sites] == ["model.layers.1.mlp.experts"] and not others
    assert sites[0].top_k == 4 and sites[0].num_experts == 6 and sites[0].opens
