"""`GenerationStats`: counts and measures that follow from the cycles, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sirius.decode.stats import Cycle, GenerationStats


MEASURES = ("acceptance_rate", "aal", "aal_gain", "draft_density", "is_masking", "effective_density")
COUNTS = (
    "num_cycles", "num_short_cycles", "num_dense_steps", "num_lookups", "num_steps", "num_compiled_steps",
    "num_compiled_verifications",
    "num_drafted", "num_accepted", "num_rolled_back", "num_nodes_drafted", "num_nodes_verified", "num_reread",
)  # fmt: skip


@st.composite
def cycles(draw, kernel_size: int):
    """A cycle whose draft is full, or was cut short."""
    is_full = draw(st.booleans())
    num_drafted = kernel_size - 1 if is_full else draw(st.integers(0, kernel_size - 2))
    drafted_ids = tuple(draw(st.lists(st.integers(0, 99), min_size=num_drafted, max_size=num_drafted)))
    likelihoods = tuple(draw(st.lists(st.floats(0, 1), min_size=num_drafted, max_size=num_drafted)))
    num_accepted = draw(st.integers(0, num_drafted))
    return Cycle(drafted_ids, num_accepted, draw(st.integers(0, 99)), is_full, likelihoods, 0.5, num_accepted)


@st.composite
def calls(draw):
    """(kernel_size, the cycles of one `generate` call)"""
    kernel_size = draw(st.integers(2, 9))
    return kernel_size, draw(st.lists(cycles(kernel_size), max_size=12))


def record(kernel_size: int, of_call: list[Cycle], total: GenerationStats | None = None) -> GenerationStats:
    stats = GenerationStats(kernel_size, total=total)
    for cycle in of_call:
        stats.record_cycle(cycle)
    return stats


def make_cycle(num_accepted: int, num_drafted: int = 3, is_full: bool = True) -> Cycle:
    return Cycle(tuple(range(num_drafted)), num_accepted, 9, is_full, (0.5,) * num_drafted, 0.5, num_accepted)


@given(call=calls())
def test_counts_are_those_of_the_cycles(call):
    kernel_size, of_call = call
    stats = record(kernel_size, of_call)
    assert stats.cycles == of_call
    assert stats.num_cycles == len(of_call)
    assert stats.num_short_cycles == sum(not cycle.is_full for cycle in of_call)
    assert stats.num_dense_steps == sum(not cycle.drafted_ids for cycle in of_call)
    assert stats.num_drafted == sum(len(cycle.drafted_ids) for cycle in of_call)
    assert stats.num_accepted + stats.num_rolled_back == stats.num_drafted
    assert sum(cycle.advance_length for cycle in of_call) == stats.num_accepted + stats.num_cycles
    if stats.num_drafted:
        assert stats.acceptance_rate == stats.num_accepted / stats.num_drafted
        assert 0 <= stats.acceptance_rate <= 1


@given(call=calls(), draft_density=st.floats(0.01, 1))
def test_measures_are_the_papers(call, draft_density):
    kernel_size, of_call = call
    stats = record(kernel_size, of_call)
    stats.record_draft_density(draft_density, is_masking=False)
    full = [cycle for cycle in of_call if cycle.is_full]
    if not full:
        assert stats.aal is None and stats.effective_density is None
        return
    aal = sum(len(cycle.drafted_ids[: cycle.num_accepted]) + 1 for cycle in full) / len(full)
    assert stats.aal == pytest.approx(aal) and 1 <= stats.aal <= kernel_size
    assert stats.effective_density == pytest.approx((draft_density * (kernel_size - 1) + 1) / aal)


@pytest.mark.parametrize(
    "accepted, aal, effective_density",
    [
        ([3, 3], 4.0, (3 * 0.5 + 1) / 4),  # every draft kept
        ([0, 0], 1.0, 3 * 0.5 + 1),  # every draft lost
        ([3, 0], 2.5, 1.0),  # breaks even
    ],
)
def test_worked_examples(accepted, aal, effective_density):
    stats = record(4, [make_cycle(num_accepted) for num_accepted in accepted])
    stats.record_draft_density(0.5, is_masking=False)
    assert stats.aal == aal and stats.effective_density == pytest.approx(effective_density)


def test_short_cycles_count_but_do_not_move_aal():
    stats = record(4, [make_cycle(3), make_cycle(0, num_drafted=1, is_full=False)])
    assert (stats.aal, stats.num_cycles, stats.num_short_cycles, stats.num_drafted) == (4.0, 2, 1, 4)
    assert stats.acceptance_rate == 0.75


def test_before_any_cycle_measures_are_none_and_counts_zero():
    stats = GenerationStats(4)
    assert all(getattr(stats, name) == 0 for name in COUNTS)
    assert stats.acceptance_rate is stats.aal is stats.draft_density is stats.effective_density is None


@given(first=calls(), others=st.lists(st.floats(0.01, 1), min_size=1, max_size=3), data=st.data())
def test_the_total_is_the_sum_of_the_calls(first, others, data):
    kernel_size, _ = first
    total = GenerationStats(kernel_size)
    of_calls = [first[1], *(data.draw(st.lists(cycles(kernel_size), max_size=4)) for _ in others)]
    stats_of_calls = [record(kernel_size, of_call, total) for of_call in of_calls]
    for stats, draft_density in zip(stats_of_calls[1:], others, strict=True):  # the first call drafted nothing
        stats.record_draft_density(draft_density, is_masking=False)
    as_one_call = record(kernel_size, [cycle for of_call in of_calls for cycle in of_call])
    for name in (*COUNTS, "acceptance_rate", "aal"):
        assert getattr(total, name) == getattr(as_one_call, name), name
    assert total.draft_density == pytest.approx(sum(others) / len(others))
    assert total.cycles == []  # so that it does not grow with the calls


def test_reset_clears_the_call_and_the_total():
    total = GenerationStats(4)
    stats = record(4, [make_cycle(2)], total)
    stats.record_draft_density(0.5, is_masking=False)
    stats.reset()
    blank = GenerationStats(4).as_dict()
    assert stats.as_dict() == total.as_dict() == blank and stats.cycles == []
    stats.record_cycle(make_cycle(3))
    assert stats.aal == total.aal == 4.0


@given(call=calls(), draft_density=st.none() | st.floats(0.01, 1))
def test_as_dict_is_plain_json(call, draft_density):
    stats = record(*call)
    if draft_density is not None:
        stats.record_draft_density(draft_density, is_masking=False)
    values = stats.as_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert {"kernel_size", "reason", "not_compiled", *MEASURES, *COUNTS} == set(values)


def test_repr_is_readable():
    stats = record(4, [make_cycle(1), make_cycle(2), make_cycle(2)])
    shown = repr(stats)
    assert shown.startswith("GenerationStats(kernel_size=4, num_cycles=3,")
    assert "aal=2.667" in shown and "acceptance_rate=0.556" in shown and "draft_density=None" in shown


def test_a_cycle_cannot_be_changed():
    with pytest.raises(AttributeError):
        make_cycle(1).num_accepted = 2
