"""Tokens that are looked up in the text in place of a draft: the output stays, and those that lose are left."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EAGER, SLIDING, build_model, make_prompt, shared_model
from transformers import GenerationConfig

from hf_sirius import make_sparse
from hf_sirius.decode.controller import Controller
from hf_sirius.decode.costs import costs_of
from hf_sirius.decode.stats import Cycle, GenerationStats
from hf_sirius.draft.lookup import LookupProposer
from hf_sirius.settings.config import SiriusConfig


FIELDS = {"method": "griffin", "density": 0.5, "kernel_size": 4}


def repetitive_prompt(seed: int = 0, num_repeats: int = 4) -> torch.Tensor:
    return make_prompt(5, seed=seed).repeat(1, num_repeats)


def looked_up(stats: GenerationStats) -> list[Cycle]:
    return [cycle for cycle in stats.cycles if cycle.is_lookup]


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(["llama", "gpt2", *SLIDING]),
    num_tokens=st.integers(1, 12),
    max_matching_ngram_size=st.sampled_from([None, 1, 3]),
    padding=st.integers(0, 3),
    max_new_tokens=st.integers(1, 24),
    eos=st.lists(st.integers(1, 47), max_size=6),
    seed=st.integers(0, 10**6),
)
def test_the_output_is_the_dense_one(family, num_tokens, max_matching_ngram_size, padding, max_new_tokens, eos, seed):
    model, prompt = shared_model(family), repetitive_prompt(seed)
    mask = torch.ones_like(prompt)
    mask[:, : 0 if family in EAGER else padding] = 0
    options = {"max_new_tokens": max_new_tokens, "attention_mask": mask, "pad_token_id": 0}
    options |= {"eos_token_id": eos} if eos else {}
    expected = model.generate(prompt, do_sample=False, **options)
    options["max_matching_ngram_size"] = max_matching_ngram_size
    with make_sparse(model, threshold=1.0, **FIELDS) as twin:
        outputs = model.generate(
            prompt, do_sample=False, assistant_model=twin, prompt_lookup_num_tokens=num_tokens, **options
        )
        assert torch.equal(outputs, expected)
        for cycle in looked_up(twin.stats):
            assert 0 < len(cycle.drafted_ids) <= num_tokens and not cycle.num_steps
        num_new = outputs.shape[1] - prompt.shape[1]
        if num_new == max_new_tokens > 2 and not eos:
            assert sum(cycle.advance_length for cycle in twin.stats.cycles) >= num_new - 1


def test_what_repeats_is_looked_up_and_the_twin_drafts_the_rest():
    model = build_model()
    with make_sparse(model, threshold=1.0, **FIELDS) as twin:
        model.generate(repetitive_prompt(), max_new_tokens=40, assistant_model=twin, prompt_lookup_num_tokens=6)
        assert looked_up(twin.stats) and any(cycle.num_steps for cycle in twin.stats.cycles)
        # Without the option a fixed number of tokens is drafted, as ever.
        model.generate(repetitive_prompt(), max_new_tokens=40, assistant_model=twin)
        assert not looked_up(twin.stats)


def test_scores_and_a_second_turn():
    model, prompt = build_model(), repetitive_prompt()
    options = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(prompt, **options)
    with make_sparse(model, threshold=1.0, **FIELDS) as twin:
        options |= {"assistant_model": twin, "prompt_lookup_num_tokens": 6}
        outputs = model.generate(prompt, **options)
        assert looked_up(twin.stats) and torch.equal(outputs.sequences, expected.sequences)
        assert torch.allclose(torch.stack(outputs.scores), torch.stack(expected.scores))
        turn = torch.cat([outputs.sequences, prompt], dim=-1)
        again = model.generate(turn, past_key_values=outputs.past_key_values, **options)
        assert looked_up(twin.stats)
    assert torch.equal(again.sequences, model.generate(turn, max_new_tokens=20))


def test_below_a_threshold_of_one_only_who_asks_gets_them():
    model, prompt = build_model(), repetitive_prompt()
    with make_sparse(model, threshold=0.0, **FIELDS) as twin:
        model.generate(prompt, max_new_tokens=30, assistant_model=twin, prompt_lookup_num_tokens=4)
        kept = looked_up(twin.stats)
        assert kept and all(cycle.num_accepted == len(cycle.drafted_ids) for cycle in kept)
    with make_sparse(model, threshold=0.5, **{**FIELDS, "kernel_size": "auto"}) as twin:
        for _ in range(5):
            model.generate(prompt, max_new_tokens=30, assistant_model=twin)
            assert not looked_up(twin.stats)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_forbidden_tokens_are_not_kept(threshold):
    model, prompt = build_model(), repetitive_prompt()
    options = {"max_new_tokens": 30, "no_repeat_ngram_size": 2}
    with make_sparse(model, threshold=threshold, **FIELDS) as twin:
        outputs = model.generate(prompt, assistant_model=twin, prompt_lookup_num_tokens=4, **options)
        assert looked_up(twin.stats)
    new = outputs[0, prompt.shape[1] - 1 :].tolist()
    bigrams = list(itertools.pairwise(new))
    assert len(set(bigrams)) == len(bigrams)


def test_zero_looks_nothing_up_and_less_is_refused():
    model, prompt = build_model(), repetitive_prompt()
    with make_sparse(model, threshold=1.0, **FIELDS) as twin:
        model.generate(prompt, max_new_tokens=20, assistant_model=twin, prompt_lookup_num_tokens=0)
        assert twin.stats.num_drafted and not looked_up(twin.stats)
        with pytest.raises(ValueError, match="num_output_tokens"):
            model.generate(prompt, max_new_tokens=20, assistant_model=twin, prompt_lookup_num_tokens=-1)


@pytest.mark.parametrize("seed", range(6))
def test_scores_of_a_call_that_ends_early(seed):
    model, prompt = build_model(), repetitive_prompt(seed)
    options = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
    options["eos_token_id"] = [7 * seed % 47 + 1, 20, 30]
    expected = model.generate(prompt, **options)
    with make_sparse(model, threshold=1.0, **FIELDS) as twin:
        outputs = model.generate(prompt, assistant_model=twin, prompt_lookup_num_tokens=6, **options)
    assert torch.equal(outputs.sequences, expected.sequences) and len(outputs.scores) == len(expected.scores)


@pytest.mark.parametrize("kernel_size", [4, "auto"])
def test_a_tree_and_a_lookup_are_refused(kernel_size):
    model = build_model()
    with (
        make_sparse(model, threshold=1.0, **{**FIELDS, "kernel_size": kernel_size}, tree_width=3) as twin,
        pytest.raises(ValueError, match="prompt_lookup_num_tokens=5 came with a twin of tree_width=3"),
    ):
        model.generate(make_prompt(), max_new_tokens=5, assistant_model=twin, prompt_lookup_num_tokens=5)


def test_it_ends_before_a_token_at_which_the_call_would_stop():
    ids = torch.tensor([[1, 2, 3, 4, 5, 1, 2]])
    config = GenerationConfig(prompt_lookup_num_tokens=4)
    asked = []

    def would_stop(input_ids, scores):
        asked.append(input_ids[0].tolist())
        return input_ids[0, -1] == 5

    proposal = LookupProposer(config, would_stop, 99).propose(ids, 9)
    assert proposal.ids.tolist() == [[3, 4]] and proposal.is_lookup and proposal.scores is None
    assert asked[0] == [*ids[0].tolist(), 3]
    assert proposal.is_cut
    whole, short = (LookupProposer(config, None, 99).propose(ids, most) for most in (9, 2))
    assert whole.ids.tolist() == [[3, 4, 5, 1]] and not whole.is_cut
    assert short.ids.tolist() == [[3, 4]] and short.is_cut
    chosen = LookupProposer(config, None, 99).propose(ids, 9, lambda num_found: num_found - 1)
    assert chosen.ids.tolist() == [[3, 4, 5]] and not chosen.is_cut
    assert LookupProposer(config, would_stop, 99).propose(ids, 9, lambda num_found: 0) is None
    assert LookupProposer(config, lambda ids, scores: True, 99).propose(ids, 9) is None
    # Of an image there is no logit.
    assert LookupProposer(config, None, 4).propose(ids, 9).ids.tolist() == [[3]]
    assert LookupProposer(config, None, 3).propose(ids, 9) is None
    for nothing in (torch.tensor([[1, 2, 3]]), torch.tensor([[1]]), torch.zeros(1, 0, dtype=torch.long)):
        assert LookupProposer(config, None, 99).propose(nothing, 9) is None


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(["llama", *SLIDING]), choices=st.lists(st.integers(0, 8), min_size=4, max_size=16),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_whatever_is_chosen_the_output_is_the_dense_one(family, choices, seed):
    model, prompt, chance = shared_model(family), repetitive_prompt(seed), random.Random(seed)
    expected = model.generate(prompt, max_new_tokens=20)
    wanted = iter(choices * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Controller, "looks_up", lambda self: chance.random() < 0.7)
        patch.setattr(Controller, "num_looked_up", lambda self, found, sought: min(found, next(wanted)))
        patch.setattr(Controller, "num_tokens", lambda self, most: max(0, min(next(wanted), most)))
        with make_sparse(model, threshold=1.0, **{**FIELDS, "kernel_size": "auto"}) as twin:
            assert torch.equal(model.generate(prompt, max_new_tokens=20, assistant_model=twin), expected)
            assert sum(cycle.advance_length for cycle in twin.stats.cycles) >= 19


class Text:
    """What the controller sees of a model and its draft, and of a text in which some tokens are found every time."""

    def __init__(
        self, acceptance: float, per_token: float, step: float, draft_acceptance: float, seed: int = 0, least: int = 10
    ):
        self.acceptance, self.per_token, self.step = acceptance, per_token, step
        self.draft_acceptance, self.num_drafts = draft_acceptance, 0
        self.least = least  # of the 10 tokens that are sought
        self.model, self.random = torch.nn.Linear(1, 1), random.Random(seed)

    def num_kept(self, num_tokens: int, acceptance: float) -> int:
        kept = 0
        while kept < num_tokens and self.random.random() < acceptance:
            kept += 1
        return kept

    def call(self, max_tokens: int) -> float:
        """Returns the seconds of a call; the dense model takes one for each token."""
        config = SiriusConfig(kernel_size="auto", threshold=1.0)
        controller, seconds, length = Controller(self.model, config), 0.0, 0
        while length < max_tokens:
            most = max_tokens - length - 1
            num = 0
            if most and controller.looks_up():
                num = controller.num_looked_up(min(self.random.randint(self.least, 10), most), 10)
            is_lookup = bool(num)
            if not num and (most := controller.num_tokens(most)):
                num = 1
                while num < most and controller.goes_on(num * [1.0]):
                    num += 1
            self.num_drafts += bool(num) and not is_lookup
            kept = self.num_kept(num, self.acceptance if is_lookup else self.draft_acceptance)
            draft, verification = (0.0 if is_lookup else num * self.step), 1 + num * self.per_token
            controller.note(
                Cycle((1,) * num, kept, 2, True, (0.5,) * num, 0.5, kept, 0 if is_lookup else num, is_lookup, draft,
                      verification),
                num * [1.0],
            )  # fmt: skip
            seconds += draft + verification
            length += kept + 1
        return seconds


@settings(deadline=None)
@given(per_token=st.floats(0.0, 0.6), step=st.floats(0.3, 1.2), seed=st.integers(0, 99))
def test_what_is_never_kept_costs_little_and_less_the_next_time(per_token, step, seed):
    text = Text(0.0, per_token, step, 0.0, seed)
    seconds = [text.call(128) for _ in range(8)]
    assert seconds[0] <= 1.3 * 128
    assert sum(seconds[4:]) <= 1.04 * 4 * 128


@settings(deadline=None, max_examples=40)
@given(per_token=st.floats(0.0, 0.08), acceptance=st.floats(0.85, 0.99))
def test_what_is_kept_is_taken_in_place_of_a_draft(per_token, acceptance):
    text = Text(acceptance, per_token, 0.3, 0.9)
    seconds = [text.call(128) for _ in range(24)]  # of which the first may pass lookups by, as one has failed
    best = min((1 + n * per_token) / sum(acceptance**i for i in range(n + 1)) for n in range(1, 11))
    assert sum(seconds[4:]) <= 1.3 * best * 20 * 128


def test_what_is_found_keeps_no_good_draft_from_being_tried():
    text = Text(acceptance=0.4, per_token=0.02, step=0.1, draft_acceptance=0.95)
    assert sum(text.call(128) for _ in range(8)) <= 0.5 * 8 * 128 and text.num_drafts
    text = Text(acceptance=0.4, per_token=0.02, step=0.1, draft_acceptance=0.0)
    text.call(400)
    text.draft_acceptance, text.num_drafts = 0.95, 0
    assert sum(text.call(256) for _ in range(8)) <= 0.75 * 8 * 256 and text.num_drafts


def test_few_tokens_found_are_no_reason_to_leave_the_many():
    few, many = (Text(0.95, 0.02, 1.5, 0.0, least=least) for least in (1, 10))
    seconds = [sum(text.call(256) for _ in range(6)) / (6 * 256) for text in (few, many)]
    assert seconds[1] < 0.45 and seconds[0] < 0.6
    assert many.call(6) <= 6.5 and many.call(256) <= 0.45 * 256  # nor is the end of a call


def test_stats_of_looked_up_tokens():
    stats = GenerationStats("auto")
    stats.record_cycle(Cycle((1, 2), 2, 9, True, (0.5, 0.5), 0.5, 2, 2))
    stats.record_cycle(Cycle((3, 4, 5), 3, 9, True, (0.5,) * 3, 0.5, 3, is_lookup=True))
    stats.record_draft_density(0.5, is_masking=False)
    assert stats.aal == 3.5 and stats.num_drafted == 5
    assert stats.effective_density == (2 * 0.5 + 2) / 7  # what is looked up reads no weights


def test_the_controller_looks_tokens_up_by_itself():
    model, prompt = build_model(), repetitive_prompt(num_repeats=8)
    expected = model.generate(prompt, max_new_tokens=30)
    with make_sparse(model, threshold=1.0, **{**FIELDS, "kernel_size": "auto"}) as twin:
        model.generate(prompt, max_new_tokens=30, assistant_model=twin)
        record = costs_of(model, twin.sirius_config)[1]
        found = []
        for _ in range(4):
            record.lookups.accepted, record.lookups.waiting = 99.0, 0  # whatever was kept, they seem to be good
            assert torch.equal(model.generate(prompt, max_new_tokens=30, assistant_model=twin), expected)
            found += looked_up(twin.stats)
        assert found
