"""`kernel_size="auto"`: whatever is chosen the output stays, and a draft that loses is left."""

import collections
import dataclasses
import random
import statistics

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny import EAGER, METHODS, SLIDING, build_model, make_prompt, shared_model

from hf_sirius import make_sparse
from hf_sirius.decode import controller as controlling
from hf_sirius.decode import costs as counting
from hf_sirius.decode.controller import Controller
from hf_sirius.decode.costs import ModelCosts, costs_of
from hf_sirius.decode.stats import Cycle
from hf_sirius.settings.config import SiriusConfig


AUTO = SiriusConfig(kernel_size="auto")


class Machine:
    """A model and its draft as the controller sees them: what they take, and what is kept."""

    def __init__(
        self,
        step: float,
        per_token: float,
        acceptance: float,
        selection: float = 0.0,
        seed: int = 0,
        knows=False,
        second: float = 0.0,  # what a verification's second token takes above the others
    ):
        self.step, self.per_token, self.acceptance, self.selection = step, per_token, acceptance, selection
        self.second = second
        self.model, self.random = torch.nn.Linear(1, 1), random.Random(seed)
        self.knows = knows  # whether margins tell which tokens are kept for sure

    def token(self) -> tuple[float, bool]:
        """Returns a token's margin, and whether it is kept."""
        if not self.knows:
            return self.random.expovariate(1.0), self.random.random() < self.acceptance
        is_doubtful = self.random.random() < 2 * (1 - self.acceptance)
        return (0.05, self.random.random() < 0.5) if is_doubtful else (3.0, True)

    def verification(self, num_tokens: int) -> float:
        return 1.0 + self.per_token * (num_tokens - 1) + self.second * (num_tokens > 1)

    def call(self, max_tokens: int) -> float:
        """Returns the seconds of a call that writes so many tokens; the dense model takes one for each."""
        controller, seconds, length, is_selected = Controller(self.model, AUTO), 0.0, 0, False
        while length < max_tokens:
            num_tokens = controller.num_tokens(max_tokens - length - 1)
            assert 0 <= num_tokens <= max(max_tokens - length - 1, 0)
            if num_tokens and not is_selected:
                is_selected, seconds = True, seconds + self.selection
                controller.note_selection(self.selection)
            tokens: list[tuple[float, bool]] = []
            while len(tokens) < num_tokens and (not tokens or controller.goes_on([margin for margin, _ in tokens])):
                tokens.append(self.token())
            num_tokens = len(tokens)
            num_accepted = next((i for i, (_, is_kept) in enumerate(tokens) if not is_kept), num_tokens)
            draft, verification = num_tokens * self.step, self.verification(1 + num_tokens)
            is_full = length + num_tokens + 1 < max_tokens
            margins = [margin for margin, _ in tokens]
            controller.note(cycle(num_tokens, num_accepted, draft, verification, is_full), margins)
            seconds += draft + verification
            length += num_accepted + 1
        return seconds

    def best(self) -> float:
        """Returns the least seconds per token of any fixed number of drafted tokens; a dense step takes 1."""
        a = self.acceptance
        return min(
            (n * self.step + self.verification(1 + n)) / sum(a**i for i in range(n + 1))
            for n in range(1, controlling.LONGEST + 1)
        )


def cycle(
    num_drafted: int, num_accepted: int, draft_seconds: float, verification_seconds: float, is_full: bool = True
) -> Cycle:
    return Cycle(
        drafted_ids=(1,) * num_drafted, num_accepted=num_accepted, bonus_id=2, is_full=is_full, num_agreed=num_accepted,
        likelihoods=(0.5,) * num_drafted, bonus_likelihood=0.5, num_steps=num_drafted, draft_seconds=draft_seconds,
        verification_seconds=verification_seconds,
    )  # fmt: skip


def test_what_states_cost_behind_a_rejection_is_part_of_a_cycle():
    longest = []
    for state_seconds in (0.0, 3.0, 30.0):
        controller = Controller(torch.nn.Linear(1, 1), AUTO)
        for num_drafted, num_accepted in [(0, 0), (0, 0), (4, 4), (8, 8)] * 4 + [(8, 3)] * 6:
            is_rejected = num_accepted < num_drafted
            of_cycle = cycle(num_drafted, num_accepted, 0.2 * num_drafted, 1.0 + 0.01 * num_drafted)
            controller.note(dataclasses.replace(of_cycle, state_seconds=state_seconds * is_rejected))
        longest.append(controller._best(64)[0])
    assert longest[0] > longest[1] > longest[2] == 0


# Of dearer tokens a single long draft, taken by chance, is a quarter of a call.
@settings(deadline=None)
@given(
    step=st.floats(0.02, 1.2), per_token=st.floats(0.0, 0.5), acceptance=st.floats(0.0, 1.0), seed=st.integers(0, 999)
)
def test_a_draft_that_loses_costs_little_and_less_the_next_time(step, per_token, acceptance, seed):
    machine = Machine(step, per_token, acceptance, seed=seed)
    seconds = [machine.call(128) for _ in range(20)]
    assert seconds[0] <= 1.25 * 128  # in which what verifications take is found out
    if machine.best() > 1.05:  # no draft wins
        assert sum(seconds[4:]) <= 1.03 * 16 * 128


@settings(deadline=None, max_examples=50)
@given(
    step=st.floats(0.05, 0.6),
    per_token=st.floats(0.0, 0.2),
    acceptance=st.floats(0.8, 0.99),
    second=st.sampled_from([0.0, 0.2, 0.5]),
)
@example(step=0.36, per_token=0.03, acceptance=0.985, second=0.2)  # of which one token more was never worth it
def test_a_draft_that_wins_is_nearly_as_long_as_is_best(step, per_token, acceptance, second):
    machine = Machine(step, per_token, acceptance, second=second)
    assume((best := machine.best()) <= 0.8)
    seconds = [machine.call(128) for _ in range(26)]  # of fewer calls chance has too great a share
    assert sum(seconds[2:]) <= 1.12 * best * 24 * 128


@settings(deadline=None)
@given(step=st.floats(0.3, 0.6), per_token=st.floats(0.0, 0.1), acceptance=st.floats(0.9, 0.97))
def test_a_draft_that_knows_its_doubts_is_faster_than_any_fixed_number(step, per_token, acceptance):
    machine = Machine(step, per_token, acceptance, knows=True)
    assume((best := machine.best()) <= 0.9)
    seconds = [machine.call(128) for _ in range(10)]
    assert sum(seconds[2:]) <= 0.99 * best * 8 * 128


def test_a_draft_is_tried_again_and_taken_when_it_wins():
    machine = Machine(step=0.2, per_token=0.02, acceptance=0.0)
    machine.call(400)
    machine.acceptance = 0.97
    assert sum(machine.call(128) for _ in range(20)) <= 0.8 * 20 * 128


@pytest.mark.parametrize("seed", range(6))
def test_a_text_that_drafts_do_not_suit_costs_little_and_is_forgotten(seed):
    machine = Machine(step=0.8, per_token=0.02, acceptance=0.99, seed=seed)
    for _ in range(10):
        machine.call(128)
    machine.acceptance = 0.6  # with which no draft wins
    assert sum(machine.call(128) for _ in range(12)) <= 1.03 * 12 * 128
    machine.acceptance = 0.99
    for _ in range(4):
        machine.call(128)
    assert sum(machine.call(128) for _ in range(8)) <= 0.93 * 8 * 128, "drafts were left for good"


@pytest.mark.parametrize("acceptance", [0.0, 0.15, 0.3])
def test_drafts_that_are_sure_and_wrong_are_found_out_soon(acceptance):
    seconds = []
    for seed in range(8):
        machine = Machine(step=0.5, per_token=0.02, acceptance=0.995, seed=seed)
        machine.token = lambda machine=machine: (3.0, machine.random.random() < machine.acceptance)
        for _ in range(6):
            machine.call(128)
        machine.acceptance = acceptance
        seconds.append(machine.call(128) / 128)
    assert statistics.median(seconds) <= 1.3  # two drafts of 31 tokens; it had been 1.6


def sure_record() -> counting.DraftRecord:
    record = counting.DraftRecord()
    for _ in range(10):
        record.note(31, is_rejected=False)
        record.note_draft(31, [3.0] * 31, 31, is_rejected=False)
    return record


def test_what_is_known_of_a_text_is_forgotten_where_the_latest_drafts_are_of_another():
    record = sure_record()
    for num_accepted in (20, 0):
        record.note(num_accepted, is_rejected=True)
        assert record.acceptance > 0.9 and record.of_drafts[0] > 2, "as is to be expected now and then"
    record.note(0, is_rejected=True)
    assert record.acceptance < 0.7 and record.acceptance_of(3.0) == record.acceptance and record.of_drafts[0] == 0


@pytest.mark.parametrize("acceptance", [0.8, 0.95, 0.99, 0.999])
def test_what_is_known_of_a_text_is_seldom_forgotten_by_chance(acceptance, monkeypatch):
    forgotten = []
    monkeypatch.setattr(counting.DraftRecord, "_forget", lambda self: forgotten.append(self))
    record, machine, num_noted = counting.DraftRecord(), Machine(0.5, 0.02, acceptance), 3000
    forgotten.clear()
    for _ in range(num_noted):
        kept = [machine.token()[1] for _ in range(16)]
        num_accepted = kept.index(False) if False in kept else 16
        record.note(num_accepted, is_rejected=num_accepted < 16)
    assert len(forgotten) <= num_noted / 100


def test_drafts_of_before_a_wait_are_not_counted_again_behind_it():
    record = sure_record()
    for _ in range(2):
        record.note(0, is_rejected=True)
    record.leave()
    record.wait(256)
    record.note(0, is_rejected=True)
    assert record.rejected < 1.1, "those of before have faded"


def test_a_burst_of_other_work_in_the_first_steps_is_found_out():
    costs = ModelCosts()
    for num_tokens, seconds, num_times in ((1, 3.0, 4), (5, 1.5, 3), (3, 0.2, 1)):
        for _ in range(1 + num_times):
            costs.note(num_tokens, seconds)
    assert costs.of(1) == 1.5, "one token takes no longer than five; of three one measurement tells nothing"
    for _ in range(8):
        costs.note(1, 1.0)
    assert costs.of(1) == 1.0
    for _ in range(8):
        costs.note(5, -1.0)  # while another thread compiles
    assert costs.of(1) == 1.0 and costs.of(5) == 1.5


def test_dense_steps_are_measured_again_while_drafts_win():
    machine = Machine(step=0.2, per_token=0.02, acceptance=0.99)
    costs, _ = costs_of(machine.model, AUTO)
    for _ in range(3):
        costs.note(1, 3.0)  # in a burst of other work
    nums = []
    with pytest.MonkeyPatch.context() as patch:
        note = Controller.note
        patch.setattr(
            Controller, "note", lambda self, cycle, *rest: (nums.append(cycle.num_steps), note(self, cycle, *rest))
        )
        for _ in range(20):
            machine.call(128)
    assert 4 <= nums.count(0) < 0.2 * len(nums)
    assert costs.of(1) == 1.0


def test_a_draft_ends_sooner_where_a_rejection_costs_more():
    lengths = []
    for state_seconds in (0.0, 4.0):
        controller = Controller(torch.nn.Linear(1, 1), AUTO)
        for num_drafted, num_accepted in [(0, 0), (0, 0), (8, 8), (8, 8), (8, 6), (16, 16)] * 4:
            of_cycle = cycle(num_drafted, num_accepted, 0.2 * num_drafted, 1.0 + 0.01 * num_drafted)
            controller.note(dataclasses.replace(of_cycle, state_seconds=state_seconds))
        most = controller.num_tokens(64)
        lengths.append(next(n for n in range(1, most + 1) if n == most or not controller.goes_on([1.0] * n)))
    assert lengths[0] > lengths[1] >= 1


def test_neurons_are_chosen_for_no_answer_that_is_too_short_for_it():
    machine = Machine(step=0.2, per_token=0.02, acceptance=0.9, selection=20.0)
    machine.call(500)
    assert machine.call(10) <= 10.5
    assert machine.call(500) <= 0.6 * 500


def test_seconds_between_and_beyond_what_was_measured():
    costs = ModelCosts()
    assert costs.of(1) is None
    for num_tokens, seconds in ((1, 1.0), (5, 2.0), (9, 1.5)):
        costs.note(num_tokens, 99.0)  # the first one is not counted
        for _ in range(3):
            costs.note(num_tokens, seconds)
        costs.note(num_tokens, 50.0)  # nor one that stands out
    assert [costs.of(n) for n in (1, 3, 5, 7, 9)] == [1.0, 1.5, 2.0, 1.75, 1.5]
    assert costs.most_tokens == 9 and costs.of(20) == 1.5 + 11 * (1.5 - 1.0) / 8 / 2
    few = ModelCosts()
    for num_tokens in (1, 1, 2, 2):
        few.note(num_tokens, float(num_tokens))
    assert few.of(2) == few.of(8) == 2.0  # what is not known is tried


def test_what_is_known_ends_with_the_model_and_does_not_grow():
    model = torch.nn.Linear(1, 1)
    first, record = costs_of(model, AUTO)
    assert costs_of(model, AUTO) == (first, record)
    for i in range(200):
        assert costs_of(model, AUTO.replace(temperature=1.0 + i))[0] is first
    assert costs_of(model, AUTO)[1] is not record  # of the latest settings alone
    known = len(counting._known)
    del model
    assert len(counting._known) == known - 1
    for _ in range(1000):
        first.note(3, 1.0)
    assert len(first._of_tokens[3]._latest) < 40


@pytest.mark.parametrize("tree_width", [1, 3])
def test_calls_that_end_at_any_token_go_on_as_they_are(tree_width):
    model = build_model()
    with make_sparse(
        model, threshold=1.0, kernel_size="auto", density=0.6, method="griffin", tree_width=tree_width
    ) as twin:
        record = costs_of(model, twin.sirius_config)[1]
        num_ended = 0
        for seed in range(12):
            for _ in range(3):  # whatever they took, and were worth, drafts seem to be cheap and good
                record.step.note(1e-6)
            record.accepted = record.all_accepted = 99.0
            record.rejected, record.all_rejected, record.waiting = 0.0, 0.0, 0
            prompt, eos = make_prompt(seed=seed), {"eos_token_id": list(range(seed, 48, 5)), "pad_token_id": 0}
            expected = model.generate(prompt, max_new_tokens=20, **eos)
            assert torch.equal(model.generate(prompt, max_new_tokens=20, assistant_model=twin, **eos), expected)
            num_ended += any(c.num_steps and not c.drafted_ids for c in twin.stats.cycles)
        assert (num_ended or tree_width > 1) and twin.stats.total.num_accepted


@pytest.fixture
def any_choice(monkeypatch):
    """Has the controller choose by chance, and remember nothing."""
    chance = random.Random(0)
    monkeypatch.setattr(Controller, "num_tokens", lambda self, most: chance.randint(0, max(0, min(most, 6))))
    return chance


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(["llama", "gpt2", *SLIDING]),
    method=st.sampled_from(list(METHODS)),
    density=st.floats(0.05, 1.0),
    tree_width=st.sampled_from([1, 3]),
    draft_dtype=st.sampled_from([None, "int8"]),
    wanted=st.lists(st.integers(0, 7), min_size=1, max_size=16),
    padding=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_whatever_is_chosen_the_output_is_the_dense_one(
    family, method, density, tree_width, draft_dtype, wanted, padding, seed
):
    model, prompt, choices = shared_model(family), make_prompt(seed=seed), iter(wanted)
    mask = torch.ones_like(prompt)
    mask[:, : 0 if family in EAGER else padding] = 0  # of a row that is all masked its logits are not finite
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    fields = {**METHODS[method], "density": density, "tree_width": tree_width, "draft_dtype": draft_dtype}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Controller, "num_tokens", lambda self, most: max(0, min(next(choices, 3), most)))
        patch.setattr(Controller, "goes_on", lambda self, margins: margins[-1] > seed % 3 / 10)
        with make_sparse(model, threshold=1.0, kernel_size="auto", **fields) as twin:
            assert torch.equal(model.generate(prompt, assistant_model=twin, **options), expected)
            assert sum(c.advance_length for c in twin.stats.cycles) >= 15
            assert twin.stats.num_nodes_drafted >= min(wanted[0], 1)


def test_a_second_turn_goes_on_with_what_is_known(any_choice):
    model = build_model()
    with make_sparse(model, threshold=1.0, kernel_size="auto", density=1.0, draft_dtype="int8") as twin:
        first = model.generate(make_prompt(), max_new_tokens=9, return_dict_in_generate=True, assistant_model=twin)
        turn = torch.cat([first.sequences, make_prompt(4, seed=2)], dim=-1)
        expected = model.generate(turn, max_new_tokens=12)
        cache = first.past_key_values
        outputs = model.generate(turn, max_new_tokens=12, past_key_values=cache, assistant_model=twin)
    assert torch.equal(outputs, expected)


@pytest.mark.parametrize("method", list(METHODS))
def test_counts_of_calls_in_which_some_cycles_draft_nothing(method, any_choice):
    model, lengths = build_model(), collections.Counter()
    with make_sparse(model, threshold=1.0, kernel_size="auto", density=0.5, **METHODS[method]) as twin:
        for seed in range(4):
            model.generate(make_prompt(seed=seed), max_new_tokens=20, assistant_model=twin)
            lengths.update(len(cycle.drafted_ids) for cycle in twin.stats.cycles)
            assert sum(cycle.advance_length for cycle in twin.stats.cycles) == 19
        total = twin.stats.total
    assert lengths[0] and lengths[1] and total.num_cycles == sum(lengths.values())
    assert total.aal is not None and total.aal < 7 and 0 < total.draft_density <= 1
    assert total.as_dict()["kernel_size"] == "auto"


def test_margins_are_those_of_the_draft():
    model, prompt = build_model(), make_prompt()
    with make_sparse(model, threshold=1.0, kernel_size="auto", density=1.0, draft_dtype="int8") as twin:
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Controller, "num_tokens", lambda self, most: min(most, 3))
            patch.setattr(Controller, "note", lambda self, cycle, margins: seen.append((cycle.drafted_ids, margins)))
            model.generate(prompt, max_new_tokens=6, assistant_model=twin)
    outputs = model.generate(prompt, max_new_tokens=6)
    drafted_ids, margins = seen[0]
    assert drafted_ids == tuple(outputs[0, prompt.shape[1] + 1 :][:3].tolist())
    best = model(outputs).logits[0, prompt.shape[1] : -1].topk(2).values
    torch.testing.assert_close(torch.tensor(margins), (best[:, 0] - best[:, 1])[:3].float(), rtol=0.1, atol=0.05)


def test_what_is_kept_is_learnt_by_margins():
    record = counting.DraftRecord()
    before = record.acceptance_of(0.05)
    for _ in range(20):
        record.note_draft(2, [3.0, 0.05], 1, is_rejected=True)
    record.note_draft(3, [3.0, 0.05, 1.0], 1, is_rejected=True)
    assert record.acceptance_of(0.05) < 0.2 < before and record.acceptance_of(3.0) > 0.9
    assert record.acceptance_of(1.0) == record.acceptance == before, "of it nothing was judged"
    assert record.acceptance_of(float("inf")) == record.acceptance_of(2.0)


def test_stats_say_why(monkeypatch):
    model = build_model()
    with make_sparse(model, threshold=1.0, kernel_size="auto", density=0.05, method="griffin") as twin:
        assert twin.stats.reason is None
        model.generate(make_prompt(), max_new_tokens=3, assistant_model=twin)
        assert twin.stats.reason == "a dense step is measured"
        record = costs_of(model, twin.sirius_config)[1]
        for _ in range(3):
            record.step.note(99.0)
        record.lookups.waiting = 99
        model.generate(make_prompt(), max_new_tokens=8, assistant_model=twin)
        assert twin.stats.reason.startswith("drafting given up for 32 cycles: a draft step costs ")
        assert not twin.stats.num_drafted and twin.stats.draft_density is None
        assert twin.stats.selection_seconds == 0.0  # nothing is chosen for drafts that do not come
    with make_sparse(model, threshold=1.0, kernel_size=4, density=0.05, method="griffin") as twin:
        model.generate(make_prompt(), max_new_tokens=3, assistant_model=twin)
        assert twin.stats.reason is None and twin.stats.selection_seconds > 0
