"""The acceptance rule, the hook that applies it, and that sampling keeps the full model's distribution."""

import collections
import functools
import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import build_model, make_prompt, slow_unless
from transformers import (
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from hf_sirius import make_sparse
from hf_sirius.decode.controller import Controller
from hf_sirius.decode.verification import VerificationHook, is_accepted
from hf_sirius.draft.draft import Draft
from hf_sirius.draft.lookup import LookupProposer
from hf_sirius.weights import shortlist


# The rule, a pure function.

VOCAB = 7
likelihoods = st.floats(0.0, 1.0)
temperatures = st.floats(0.05, 5.0)
logit_rows = st.lists(
    st.lists(st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB), min_size=1, max_size=4
).map(lambda rows: torch.tensor(rows, dtype=torch.float32))


def every_candidate(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns every token as a candidate at every row: long [num_rows, VOCAB], float [num_rows, VOCAB, VOCAB]."""
    return torch.arange(VOCAB).expand(len(rows), VOCAB), rows.unsqueeze(1).expand(-1, VOCAB, -1)


@given(logit_rows, likelihoods, temperatures, st.booleans())
def test_rule_is_the_paper_s(rows, threshold, temperature, do_sample):
    accepted = is_accepted(*every_candidate(rows), threshold, temperature, do_sample)
    for row, kept in zip(rows, accepted, strict=True):
        likelihood = (row / temperature).softmax(-1)
        for token in range(VOCAB):
            is_likely = threshold < 1.0 and bool(likelihood[token] >= threshold)
            is_top = not do_sample and token == int(row.argmax())
            assert bool(kept[token]) == (is_likely or is_top)


@given(logit_rows, temperatures)
def test_threshold_one_keeps_the_argmax_alone(rows, temperature):
    candidate_ids, scores = every_candidate(rows)
    accepted = is_accepted(candidate_ids, scores, 1.0, temperature)
    assert torch.equal(accepted, candidate_ids == rows.argmax(-1, keepdim=True))
    assert not is_accepted(candidate_ids, scores, 1.0, temperature, do_sample=True).any()


@given(logit_rows, temperatures, st.booleans())
def test_threshold_zero_keeps_everything(rows, temperature, do_sample):
    assert is_accepted(*every_candidate(rows), 0.0, temperature, do_sample).all()


@given(logit_rows, likelihoods, likelihoods, temperatures, st.booleans())
def test_a_lower_threshold_never_rejects_more(rows, a, b, temperature, do_sample):
    strict = is_accepted(*every_candidate(rows), max(a, b), temperature, do_sample)
    lenient = is_accepted(*every_candidate(rows), min(a, b), temperature, do_sample)
    assert (lenient | ~strict).all()


@given(logit_rows, likelihoods, st.floats(-50, 50, width=32), st.booleans())
def test_rule_changes_none_of_its_inputs(rows, threshold, shift, do_sample):
    candidate_ids, scores = every_candidate(rows + shift)
    before = candidate_ids.clone(), scores.clone()
    is_accepted(candidate_ids, scores, threshold, 0.6, do_sample)
    assert torch.equal(candidate_ids, before[0]) and torch.equal(scores, before[1])


@pytest.mark.parametrize("threshold", [0.01, 0.5, 1.0])
def test_a_forbidden_token_is_rejected(threshold):
    scores = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert not is_accepted(torch.tensor([1]), scores, threshold, 0.6)


# The hook.


def run_hook(hook: VerificationHook, candidate_ids: torch.Tensor, start: int, scores: torch.Tensor) -> torch.Tensor:
    """Processes scores [1, num_drafted + 1, vocab_size] position by position, as the stock loop does."""
    processed = scores.clone()
    for i in range(scores.shape[1]):
        processed[:, i] = hook(candidate_ids[:, : start + i], processed[:, i])
    return processed


@given(st.integers(0, 2**31), st.integers(0, 6), likelihoods.filter(lambda x: x < 1), st.booleans())
def test_hook_lifts_what_the_rule_accepts_and_restores_it(seed, num_drafted, threshold, do_sample):
    generator = torch.Generator().manual_seed(seed)
    start = 3
    candidate_ids = torch.randint(VOCAB, (1, start + num_drafted), generator=generator)
    scores = 4 * torch.randn(1, num_drafted + 1, VOCAB, generator=generator)
    drafted_ids = candidate_ids[:, start:]
    accepted = is_accepted(drafted_ids, scores[:, :num_drafted], threshold, 0.6, do_sample)
    hook = VerificationHook(threshold, 0.6, do_sample)

    hook.arm(candidate_ids, start)
    processed = run_hook(hook, candidate_ids, start, scores)

    assert torch.equal(processed[:, -1], scores[:, -1]), "the bonus token is the full model's own"
    lifted = torch.where(accepted, drafted_ids, scores[:, :num_drafted].argmax(-1))
    assert torch.equal(processed[:, :num_drafted].argmax(-1), lifted)
    kept_for_certain = processed[:, :num_drafted].softmax(-1).gather(-1, drafted_ids.unsqueeze(-1)).squeeze(-1) == 1
    assert (kept_for_certain | ~accepted).all()
    hook.restore(processed)
    assert torch.equal(processed, scores)


def test_hook_is_inert_until_armed_and_after_its_restore():
    hook = VerificationHook(0.0, 0.6, do_sample=False)
    candidate_ids, scores = torch.tensor([[1, 2, 3, 4]]), torch.randn(1, 3, VOCAB)
    assert torch.equal(run_hook(hook, candidate_ids, 2, scores), scores)
    hook.arm(candidate_ids, 2)
    hook.restore(run_hook(hook, candidate_ids, 2, scores))
    assert torch.equal(run_hook(hook, candidate_ids, 2, scores), scores)


# Greedy and sampled acceptance in a whole call.


@pytest.mark.parametrize("do_sample", [False, True])
def test_threshold_zero_accepts_all_drafts(do_sample):
    model = build_model()
    torch.manual_seed(0)
    with make_sparse(model, method="griffin", density=0.3, kernel_size=5, threshold=0.0) as sparse:
        model.generate(make_prompt(), max_new_tokens=24, do_sample=do_sample, assistant_model=sparse)
        assert sparse.stats.num_drafted == sparse.stats.num_accepted > 0


def test_acceptance_falls_as_the_threshold_rises():
    model = build_model()
    rates = []
    for threshold in (0.0, 0.02, 1.0):
        with make_sparse(model, method="griffin", density=0.3, kernel_size=5, threshold=threshold) as sparse:
            model.generate(make_prompt(), max_new_tokens=60, do_sample=False, assistant_model=sparse)
            rates.append(sparse.stats.acceptance_rate)
    assert rates == sorted(rates, reverse=True) and rates[0] == 1.0 > rates[-1]


# Sampling: goodness of fit of the joint distribution of all new tokens.

SMALL_VOCAB, NUM_TOKENS, KERNEL_SIZE = 4, 4, 4
PROMPT = torch.tensor([[1, 3, 3, 1, 2]])
LAST = 1  # the token after which a call stops, where it is asked to
Outcome = tuple[int, ...]


class StopAfter(StoppingCriteria):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


CALLS = {
    "plain": {"top_k": 0},
    "warped": {"top_k": 3, "temperature": 1.7},
    "eos": {"top_k": 0, "eos_token_id": LAST},
    "criterion": {"top_k": 0, "stopping_criteria": StoppingCriteriaList([StopAfter(LAST)])},
}


@functools.cache
def sampled_model():
    """A model of one layer with eight neurons that all matter: a draft with one of them samples otherwise."""
    model = build_model(
        vocab_size=SMALL_VOCAB, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.7, seed=5, dtype=torch.float32,
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(0.6)  # so that no token is nearly certain
    return model


def make_sampling_twin(model, threshold: float = 1.0, **fields):
    return make_sparse(model, method="griffin", density=1 / 8, kernel_size=KERNEL_SIZE, threshold=threshold, **fields)


@torch.no_grad()
def exact_probabilities(model, temperature: float = 1.0, top_k: int = 0, **stops) -> dict[Outcome, float]:
    """Returns the dense model's probability of every continuation; with `stops`, `LAST` ends it."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    continuations = torch.tensor(list(itertools.product(range(SMALL_VOCAB), repeat=NUM_TOKENS)))
    sequences = torch.cat([PROMPT.expand(len(continuations), -1), continuations], dim=1)
    logits = model(sequences).logits[:, PROMPT.shape[1] - 1 : -1].float()
    steps = torch.stack([warpers(sequences, logits[:, i]) for i in range(NUM_TOKENS)], dim=1).double().softmax(-1)
    steps = steps.gather(-1, continuations.unsqueeze(-1)).squeeze(-1)
    probabilities = {}
    for continuation, step in zip(continuations.tolist(), steps, strict=True):
        length = continuation.index(LAST) + 1 if stops and LAST in continuation else NUM_TOKENS
        probabilities[tuple(continuation[:length])] = step[:length].prod().item()
    assert sum(probabilities.values()) == pytest.approx(1)
    return probabilities


def sample(model, num_samples: int, **kwargs) -> collections.Counter[Outcome]:
    torch.manual_seed(0)
    counts = collections.Counter()
    for _ in range(num_samples):
        output = model.generate(PROMPT, max_new_tokens=NUM_TOKENS, do_sample=True, **kwargs)
        counts[tuple(output[0, PROMPT.shape[1] :].tolist())] += 1
    return counts


def p_value(counts: collections.Counter[Outcome], probabilities: dict[Outcome, float]) -> float:
    """Returns the chi-square test's p-value; outcomes expected fewer than 5 times are pooled into one."""
    assert all(probabilities.get(outcome, 0) > 0 for outcome in counts), "an impossible outcome was sampled"
    num_samples = counts.total()
    cells = [(counts[outcome], p * num_samples) for outcome, p in probabilities.items() if p * num_samples >= 5]
    pooled = num_samples - sum(seen for seen, _ in cells), num_samples - sum(expected for _, expected in cells)
    if pooled[1] > 1e-3:
        cells.append(pooled)
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


@pytest.mark.parametrize(
    "kwargs",
    [pytest.param(kw, id=name, marks=slow_unless(name in ("warped", "eos"))) for name, kw in CALLS.items()],
)
def test_sampling_at_threshold_one_keeps_the_dense_distribution(kwargs):
    model = sampled_model()
    with make_sampling_twin(model) as sparse:
        counts = sample(model, 400, assistant_model=sparse, **kwargs)
        assert 0.1 < sparse.stats.total.acceptance_rate < 0.9, "the draft should be neither right nor useless"
    assert p_value(counts, exact_probabilities(model, **kwargs)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("draft_head", ["full", "shortlist"])
@pytest.mark.parametrize("draft_dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("method", ["griffin", "cats", "teal"])
def test_no_kind_of_draft_changes_the_distribution(method, draft_dtype, draft_head, monkeypatch):
    model = sampled_model()
    # So few tokens would all be scored by the head itself.
    monkeypatch.setattr(shortlist, "_num_exact", lambda vocab_size: 1)
    monkeypatch.setattr(shortlist, "_rank", lambda hidden_size: 3)
    fields = {"method": method, "draft_dtype": draft_dtype, "draft_head": draft_head}
    with make_sparse(model, density=1 / 8, kernel_size=KERNEL_SIZE, threshold=1.0, **fields) as sparse:
        counts = sample(model, 400, assistant_model=sparse, top_k=0)
        assert 0.1 < sparse.stats.total.acceptance_rate < 1
    assert p_value(counts, exact_probabilities(model)) > 1e-3


@pytest.mark.parametrize(
    "kwargs",
    [pytest.param(kw, id=name, marks=slow_unless(name == "warped")) for name, kw in CALLS.items()],
)
def test_looked_up_tokens_keep_the_dense_distribution(kwargs, monkeypatch):
    model, found, propose = sampled_model(), [], LookupProposer.propose
    monkeypatch.setattr(LookupProposer, "propose", lambda *args: found.append(propose(*args)) or found[-1])
    with make_sampling_twin(model) as sparse:
        counts = sample(model, 400, assistant_model=sparse, prompt_lookup_num_tokens=2, **kwargs)
        assert sum(proposal is not None for proposal in found) > 30
        assert 0.1 < sparse.stats.total.acceptance_rate < 0.9
    assert p_value(counts, exact_probabilities(model, **kwargs)) > 1e-3


def test_choosing_how_many_tokens_are_drafted_keeps_the_dense_distribution(monkeypatch):
    model, chance = sampled_model(), random.Random(0)
    monkeypatch.setattr(Controller, "num_tokens", lambda self, most: chance.randint(0, max(most, 0)))
    with make_sparse(model, method="griffin", density=1 / 8, kernel_size="auto", threshold=1.0) as sparse:
        counts = sample(model, 400, assistant_model=sparse, top_k=0)
        assert 0.1 < sparse.stats.total.acceptance_rate < 0.9
    assert p_value(counts, exact_probabilities(model)) > 1e-3


def test_drafts_that_end_where_they_are_unsure_keep_the_dense_distribution(monkeypatch):
    model, asked = sampled_model(), []
    monkeypatch.setattr(Controller, "num_tokens", lambda self, most: min(most, 3))
    monkeypatch.setattr(Controller, "goes_on", lambda self, margins: asked.append(margins[-1]) or margins[-1] > 0.0)
    with make_sparse(model, method="griffin", density=1 / 8, kernel_size="auto", threshold=1.0) as sparse:
        counts = sample(model, 400, assistant_model=sparse, top_k=0)
    # That of the drawn token, which may be no likely one.
    assert min(asked) < 0 < max(asked)
    assert p_value(counts, exact_probabilities(model)) > 1e-3


@pytest.mark.slow
def test_a_compiled_draft_keeps_the_dense_distribution(monkeypatch):
    model, compile_as_traced = sampled_model(), functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_as_traced)
    with make_sampling_twin(model, compile_draft=True) as sparse:
        counts = sample(model, 400, assistant_model=sparse, top_k=0)
        assert 0.1 < sparse.stats.total.acceptance_rate < 0.9
        assert sparse._twin.compiled.graph.compiled_for and not sparse._twin.compiled._told
    assert p_value(counts, exact_probabilities(model)) > 1e-3


def test_ending_drafts_in_doubt_keeps_the_dense_distribution():
    model = sampled_model()
    with make_sampling_twin(model, draft_confidence=0.4) as sparse:
        counts = sample(model, 400, assistant_model=sparse, top_k=0)
        total = sparse.stats.total
        assert total.num_cycles < total.num_drafted < (KERNEL_SIZE - 1) * total.num_cycles, "some drafts, not all"
    assert p_value(counts, exact_probabilities(model)) > 1e-3


def sample_accepting_every_draft(model):
    with make_sampling_twin(model, threshold=0.0) as sparse:
        return sample(model, 200, assistant_model=sparse, top_k=0)


def sample_the_draft(model):
    with make_sampling_twin(model) as sparse:
        return sample(sparse, 200, top_k=0)


@pytest.mark.parametrize("wrong_sample", [sample_accepting_every_draft, sample_the_draft])
def test_the_statistic_finds_a_wrong_rule(wrong_sample):
    model = sampled_model()
    assert p_value(wrong_sample(model), exact_probabilities(model)) < 1e-12


@pytest.mark.parametrize("tree_width", [1, 3])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_draft_whose_scores_are_not_finite_ends_there(value, do_sample, tree_width, monkeypatch):
    """Such as one in float16, whose activations overflow where the full model's do not."""
    if do_sample and tree_width > 1:
        return  # which is refused
    forward, num_steps = Draft.forward, []

    def overflowing(draft, inputs):
        outputs = forward(draft, inputs)
        num_steps.append(None)
        if len(num_steps) % 3 == 0:
            outputs.logits[..., 5] = value
        return outputs

    model, options = build_model(), {"max_new_tokens": 20, "do_sample": do_sample}
    expected = model.generate(make_prompt(), **options)
    monkeypatch.setattr(Draft, "forward", overflowing)
    with make_sparse(model, method="griffin", threshold=1.0, kernel_size=8, tree_width=tree_width) as twin:
        output = model.generate(make_prompt(), assistant_model=twin, **options)
        assert do_sample or torch.equal(output, expected)
        assert output.shape == expected.shape and max(len(cycle.drafted_ids) for cycle in twin.stats.cycles) == 2


def test_a_draft_in_float16_that_overflows_does_not_end_a_sampled_call():
    model = build_model(dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight *= 1e5
            layer.mlp.down_proj.weight *= 1e-5
    with make_sparse(model, method="griffin", draft_dtype="float16") as twin:
        assert model.generate(make_prompt(), assistant_model=twin, do_sample=True, max_new_tokens=12).shape == (1, 23)
