"""Hybrids of attention and recurrent layers: their states go with what is accepted, in stock `generate`."""

import functools

import pytest
import torch
from hybrids import REFUSED, VOCAB_SIZE, available_hybrids, tiny_hybrid
from test_verification import KERNEL_SIZE, SMALL_VOCAB, exact_probabilities, p_value, sample
from tiny import sparse_logits

from hf_sirius import make_sparse
from hf_sirius.draft.states import is_recurrent, snapshot


PROMPT = torch.randint(1, VOCAB_SIZE, (1, 11), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 20, "do_sample": False}
# One whose states are read at once, one whose are read token by token, and one with both kinds of cache in a layer.
KINDS = ("bamba", "jamba", "falcon_h1")


@functools.cache
def shared_hybrid(family: str):
    return tiny_hybrid(family)


def states_of(cache) -> list[torch.Tensor]:
    layers = filter(is_recurrent, cache.layers)
    return [state for layer in layers for states in snapshot(layer) for state in states.values()]


@pytest.mark.parametrize("family", available_hybrids())
def test_output_is_the_dense_models(family):
    model = shared_hybrid(family)
    dense = model.generate(PROMPT, **GREEDY)
    assert dense[0, PROMPT.shape[1] :].unique().numel() > 4, "the output should vary"
    with make_sparse(model, method="cats", density=0.1, kernel_size=KERNEL_SIZE, threshold=1.0) as sparse:
        assert torch.equal(model.generate(PROMPT, assistant_model=sparse, **GREEDY), dense)
        assert sparse.stats.num_rolled_back and sparse.stats.num_accepted
        with torch.no_grad():
            assert (sparse_logits(sparse, PROMPT, PROMPT[:, -3:]) - model(PROMPT[:, -3:]).logits).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["griffin", "teal"])
@pytest.mark.parametrize("family", ["bamba", "qwen3_5_text"])
def test_other_methods_draft_as_well(family, method):
    model = shared_hybrid(family)
    with make_sparse(model, method=method, density=0.5, kernel_size=KERNEL_SIZE, threshold=1.0) as sparse:
        output = model.generate(PROMPT, assistant_model=sparse, **GREEDY)
        assert torch.equal(output, model.generate(PROMPT, **GREEDY)) and sparse.stats.num_drafted
        if method == "teal":  # of all projections; the head is read as a whole
            assert sparse.stats.draft_density == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("family", KINDS)
def test_a_whole_draft_of_8_bits_and_looked_up_tokens(family):
    model = shared_hybrid(family)
    prompt = torch.cat([PROMPT, PROMPT[:, :7]], dim=1)
    dense = model.generate(prompt, **GREEDY)
    fields = {"density": 1.0, "draft_dtype": "int8", "kernel_size": KERNEL_SIZE, "threshold": 1.0}
    with make_sparse(model, **fields) as sparse:
        options = {**GREEDY, "assistant_model": sparse}
        assert torch.equal(model.generate(prompt, **options), dense) and sparse.stats.acceptance_rate > 0.5
        assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), dense)
        assert sparse.stats.num_lookups


@pytest.mark.parametrize("family", KINDS)
def test_the_cache_of_a_turn_goes_on(family):
    model = shared_hybrid(family)

    def turns(**options):
        options |= {**GREEDY, "return_dict_in_generate": True}
        first = model.generate(PROMPT, **options)
        states = [state.clone() for state in states_of(first.past_key_values)]
        ids = torch.cat([first.sequences, PROMPT[:, :4]], dim=1)
        return states, model.generate(ids, past_key_values=first.past_key_values, **options)

    expected, dense = turns()
    with make_sparse(model, method="cats", density=0.1, kernel_size=KERNEL_SIZE, threshold=1.0) as sparse:
        states, output = turns(assistant_model=sparse)
    assert torch.equal(output.sequences, dense.sequences)
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    ids = torch.cat([dense.sequences, PROMPT[:, :4]], dim=1)
    plain = [model.generate(ids, past_key_values=turn.past_key_values, **GREEDY) for turn in (output, dense)]
    assert torch.equal(*plain), "plain generate goes on with the cache"


def test_stats_tell_what_was_read_again():
    reread = {}
    for family in ("bamba", "jamba"):
        model = shared_hybrid(family)
        with make_sparse(model, method="griffin", density=0.3, kernel_size=KERNEL_SIZE, threshold=1.0) as sparse:
            model.generate(PROMPT, assistant_model=sparse, **GREEDY)
            rejected = [c for c in sparse.stats.cycles if c.num_accepted < len(c.drafted_ids)]
            reread[family] = sparse.stats.num_reread, sum(c.num_accepted + 1 for c in rejected)
            assert sparse.stats.total.num_reread == sparse.stats.num_reread
            assert sparse.stats.seconds()["state"] == sparse.stats.state_seconds > 0
            assert ("states" in str(sparse.stats)) == (family == "bamba")
    assert reread["bamba"][0] == reread["bamba"][1] > 0
    assert reread["jamba"][0] == 0 < reread["jamba"][1], "the verification leaves the states behind"


@pytest.mark.parametrize("family", KINDS)
def test_below_one_tokens_are_likely_enough_and_argmax_where_not(family):
    model, threshold = shared_hybrid(family), 0.05
    with make_sparse(model, method="griffin", density=0.3, kernel_size=KERNEL_SIZE, threshold=threshold) as sparse:
        output = model.generate(PROMPT, assistant_model=sparse, **GREEDY)
        temperature = sparse.sirius_config.temperature
        assert sparse.stats.num_rolled_back and sparse.stats.num_accepted
    with torch.no_grad():
        logits = model(output).logits[0, PROMPT.shape[1] - 1 : -1].float()
    new_ids = output[0, PROMPT.shape[1] :]
    likelihoods = (logits / temperature).softmax(dim=-1).gather(-1, new_ids[:, None])[:, 0]
    assert ((likelihoods >= threshold * 0.999) | (logits.argmax(dim=-1) == new_ids)).all()


@pytest.mark.parametrize("family", ["bamba", pytest.param("jamba", marks=pytest.mark.slow)])
def test_sampling_at_threshold_one_keeps_the_dense_distribution(family):
    small = {"vocab_size": SMALL_VOCAB, "num_hidden_layers": 2, "intermediate_size": 8}
    if family == "bamba":
        small["attn_layer_indices"] = [1]
    model = tiny_hybrid(family, torch.float32, seed=1, **small)
    with torch.no_grad():
        # So that no token is nearly certain, and some outcomes come often enough to be counted.
        model.lm_head.weight.mul_(0.4 if family == "bamba" else 1.5)
    with make_sparse(model, method="griffin", density=1 / 8, kernel_size=4, threshold=1.0) as sparse:
        counts = sample(model, 200 if family == "bamba" else 300, assistant_model=sparse, top_k=0)
        assert 0.1 < sparse.stats.total.acceptance_rate < 0.95, "the draft should be neither right nor useless"
    assert p_value(counts, exact_probabilities(model)) > 1e-3


@pytest.mark.parametrize("family", REFUSED)
def test_states_that_cannot_be_taken_back_are_refused(family):
    own, why = REFUSED[family]
    with pytest.raises(ValueError, match=why):
        make_sparse(tiny_hybrid(family, own=own))


def test_trees_and_adapters_of_zamba_are_refused():
    with pytest.raises(ValueError, match="tree_width=1"):
        make_sparse(shared_hybrid("bamba"), tree_width=2)
    with pytest.raises(ValueError, match="method='cats'"):
        make_sparse(shared_hybrid("zamba2"), method="griffin")


def test_a_compiled_draft_falls_back_with_the_reason(caplog):
    model = shared_hybrid("qwen3_5_text")
    with make_sparse(model, method="griffin", density=0.5, kernel_size=4, threshold=1.0, compile_draft=True) as sparse:
        output = model.generate(PROMPT, assistant_model=sparse, **GREEDY)
    assert torch.equal(output, model.generate(PROMPT, **GREEDY)) and "keeps states" in caplog.text


def test_stock_assistants_of_stateful_models_stay_refused():
    model = shared_hybrid("bamba")
    with make_sparse(model, method="cats"), pytest.raises(ValueError, match="stateful"):
        model.generate(PROMPT, assistant_model=tiny_hybrid("bamba", seed=2), **GREEDY)


def test_nothing_is_left_on_the_model():
    model = shared_hybrid("falcon_h1")
    with make_sparse(model, method="cats", kernel_size=KERNEL_SIZE, threshold=1.0) as sparse:
        output = model.generate(PROMPT, assistant_model=sparse, return_dict_in_generate=True, **GREEDY)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(layer.record_past for layer in output.past_key_values.layers)
