"""What is kept of values, while a draft's drift from those that the cutoffs were chosen by."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model, make_prompt

from hf_sirius import Calibration, SiriusConfig, make_sparse
from hf_sirius.sparsity.cutoffs import Cutoffs


NUM_SITES = 3


def chosen(density: float, values: torch.Tensor) -> Cutoffs:
    cutoffs = Cutoffs(SiriusConfig(method="teal", density=density), NUM_SITES)
    for idx in range(NUM_SITES):
        cutoffs.observe(idx, values.abs())
        cutoffs.choose(idx)
    return cutoffs


@settings(deadline=None)
@given(
    density=st.floats(0.2, 0.9),
    factors=st.lists(st.floats(0.6, 1.6), min_size=NUM_SITES, max_size=NUM_SITES),
    seed=st.integers(0, 99),
)
def test_drafts_keep_the_share_that_is_asked_for(density, factors, seed):
    """Whatever the factor by which a draft's states are smaller or larger than the dense model's, at each site."""
    generator = torch.Generator().manual_seed(seed)
    cutoffs = chosen(density, torch.randn(2**14, generator=generator))
    for _ in range(12):
        cutoffs.follow()
        kept = [
            cutoffs.keep(idx, factor * torch.randn(2**12, generator=generator).abs()).double().mean().item()
            for idx, factor in enumerate(factors)
        ]
    assert kept == pytest.approx([density] * NUM_SITES, rel=0.15, abs=0.03)


def test_they_stay_where_nothing_drifts():
    values = torch.arange(1.0, 1001.0)
    cutoffs = chosen(0.4, values)
    first = [float(value) for value in cutoffs.values]
    for _ in range(3):
        for idx in range(NUM_SITES):
            assert cutoffs.keep(idx, values).sum() == pytest.approx(400, abs=8)  # of bins as fine as bfloat16
        cutoffs.follow()
    assert [float(value) for value in cutoffs.values] == pytest.approx(first, rel=0.02)


def test_zeros_are_never_kept_to_fill_a_share():
    """As after a ReLU, of which fewer neurons are left than are asked for."""
    values = torch.cat([torch.zeros(900), torch.ones(100)])
    cutoffs = chosen(0.5, values)
    for _ in range(9):
        assert all(torch.equal(cutoffs.keep(idx, values), values > 0) for idx in range(NUM_SITES))
        cutoffs.follow()


@pytest.mark.parametrize("density", [0.005, 0.995, 1.0])
def test_at_the_ends_they_are_those_of_the_prompt(density):
    values = torch.arange(1.0, 1001.0)
    cutoffs = chosen(density, values)
    first = list(cutoffs.values)
    for _ in range(3):
        for idx in range(NUM_SITES):
            cutoffs.keep(idx, values / 2)
        cutoffs.follow()
    assert cutoffs.values == first


def test_those_of_a_corpus_follow_too_each_to_its_own_density():
    table = torch.stack([torch.linspace(99, 0, 100)] * NUM_SITES)  # of values that are spread evenly from 0 to 100
    budgets = torch.stack([torch.linspace(0.01, 1, 100) * factor for factor in (0.5, 0.8, 1.0)])
    metadata = {"method": "teal"}
    config = SiriusConfig(
        method="teal",
        density=0.5,
        budget="greedy",
        calibration=Calibration(table, torch.ones(NUM_SITES, 16), metadata, budgets),
    )
    cutoffs, values = Cutoffs(config, NUM_SITES, config.calibration), torch.linspace(0, 80, 4001)
    for _ in range(12):
        shares = [cutoffs.keep(idx, values).double().mean().item() for idx in range(NUM_SITES)]
        cutoffs.follow()
    assert shares == pytest.approx([0.25, 0.4, 0.5], abs=0.01)


def test_shares_are_those_of_all_drafts():
    cutoffs, kept = chosen(0.4, torch.randn(1000)), []
    for seed in range(3):
        values = torch.randn(50, generator=torch.Generator().manual_seed(seed)).abs()
        kept.append(cutoffs.keep(0, values))
        cutoffs.follow()
        assert cutoffs.share(0) == pytest.approx(torch.cat(kept).double().mean().item())
    assert cutoffs.share(1) is None


@pytest.mark.parametrize("method", ["cats", "teal"])
def test_a_call_reads_as_much_as_its_twin_is_asked_to(method):
    shares = []
    for drafts in (1, 9):
        model = build_model()
        with torch.no_grad(), make_sparse(model, method=method, density=0.3) as twin, twin.new_call() as call:
            with call.draft.observing(None):
                model(make_prompt(40))
            call.draft.select()
            for layer in model.model.layers:  # whose states have drifted since
                layer.post_attention_layernorm.weight.mul_(1.7)
            for _ in range(drafts):
                with call.draft.drafting():
                    twin(make_prompt(40, seed=1))
            cutoffs = call.draft.method.cutoffs
            shares.append([cutoffs.share(site.idx) for site in call.draft.method.sites])
    first, all_of_them = ((torch.tensor(share) / 0.3).log().abs().mean() for share in shares)
    assert all_of_them < 0.6 * first
