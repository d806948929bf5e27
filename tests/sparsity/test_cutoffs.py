"""What is kept of values, while a draft's drift from those that the cutoffs were chosen by."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import build_model, make_prompt

from hf_sirius import SiriusConfig, make_sparse
from hf_sirius.sparsity.cutoffs import Cutoffs


NUM_SITES = 3


def chosen(density: float, values: torch.Tensor) -> Cutoffs:
    cutoffs = Cutoffs(SiriusConfig(method="teal", density=density), NUM_SITES)
    for idx in range(NUM_SITES):
        cutoffs.observe(idx, values.abs())
        cutoffs.choose(idx)
    return cutoffs


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
    for _ in range(8):
        kept = [cutoffs.keep(idx, values) for idx in range(NUM_SITES)]
        cutoffs.follow()
    assert all(torch.equal(mask, values > 0) for mask in kept)


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
