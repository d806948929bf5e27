"""The summary of a call in words: what is told, and that nothing is told that was not measured."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_prompt, shared_model

from hf_sirius import make_sparse
from hf_sirius.decode.stats import Branches, Cycle, GenerationStats


def cycle(num_accepted: int, num_drafted: int = 3, is_full: bool = True, **fields) -> Cycle:
    ids = tuple(range(num_drafted))
    steps = {"num_steps": num_drafted, "draft_seconds": 0.002 * num_drafted, "verification_seconds": 0.012}
    return Cycle(ids, num_accepted, 9, is_full, (0.5,) * num_drafted, 0.5, num_accepted, **{**steps, **fields})


def dense(seconds: float) -> Cycle:
    return cycle(0, 0, verification_seconds=seconds)


def stats_of(*cycles: Cycle, kernel_size: int | str = 4, density: float | None = 0.5, is_masking: bool = False):
    stats = GenerationStats(kernel_size, total=GenerationStats(kernel_size))
    for one in cycles:
        stats.record_cycle(one)
    if density is not None:
        stats.record_draft_density(density, is_masking)
    return stats


def words(stats) -> str:
    return " ".join(str(stats).split())


def test_without_a_dense_step_no_time_is_said_to_be_saved():
    told = words(stats_of(cycle(3), cycle(1)))
    assert told.startswith("6 tokens in 2 cycles with drafts. Whether that saved time was not measured.")
    assert "4 of 6 drafted ones were kept (67%)" in told and "3.00 of 4 (AAL, over 2 cycles)" in told
    assert "6 ms a token where it drafted: drafting 33%, verifying 67%" in told
    assert "not measured: no dense step to compare with" in told and "0.50 of the model's, a token 0.83" in told


@pytest.mark.parametrize(
    ("step", "verdict"),
    [
        (0.010, "Drafting saved time: 4.5 ms a token, 0.45 of the 10 ms that a dense step took."),
        (0.0045, "Drafting saved no time: 4.5 ms a token, 1.00 of the 4.5 ms that a dense step took."),
        (0.003, "Drafting saved no time: 4.5 ms a token, 1.50 of the 3 ms that a dense step took."),
    ],
)
def test_beside_dense_steps_the_two_are_compared(step, verdict):
    stats = stats_of(dense(5.0), dense(step), cycle(3), dense(step), dense(1.0), dense(step), kernel_size="auto")
    stats.reason = "drafts of 3"
    told = words(stats)
    assert told.startswith(verdict)  # whatever the first step took, and the slowest one
    assert "5 of 6 cycles drafted nothing" in told and "1.50 (AAL, over 6 cycles, dense steps included)" in told
    assert told.endswith("at the end drafts of 3")
    total = words(stats.total)
    assert "saved time was not measured" in total and "a total keeps none" in total


def test_choosing_neurons_counts():
    stats = stats_of(*[dense(0.01)] * 4, cycle(3))
    stats.record_selection(0.022)
    assert words(stats).startswith("Drafting saved no time: 10 ms a token, 1.00 of")
    assert "drafting 15%, verifying 30%, choosing neurons 55%" in words(stats)


def test_few_dense_steps_are_no_measurement():
    for number in (1, 2, 3):
        told = words(stats_of(*[dense(5.0)] * number, cycle(3)))
        assert "was not measured" in told and "too few dense steps" in told


def test_short_outputs_tell_why_there_is_no_average():
    told = words(stats_of(cycle(2, is_full=False)))
    assert "no average (AAL), as the end of the output cut every draft short" in told and "None" not in told
    assert "1.33 of" not in told and "a draft step needs 0.50 of the model's" in told


def test_a_twin_alone_is_not_said_to_have_drafted_nothing():
    with make_sparse(shared_model(), method="griffin") as twin:
        twin.generate(make_prompt(), max_new_tokens=8)
        assert str(twin.stats).startswith("The twin wrote alone, uncorrected.")


def test_without_drafts_none_is_told_of():
    assert str(GenerationStats(4)) == "There was no cycle, and so no draft."
    stats = stats_of(dense(0.01), dense(0.01), density=None, kernel_size="auto")
    stats.reason = "drafting given up for 32 cycles: a draft step costs 1.20 of a dense one"
    told = words(stats)
    assert told.startswith("Nothing was drafted: 2 tokens by dense steps.") and "a draft step costs 1.20" in told
    assert "parameters" not in told


def test_what_costs_more_than_it_saves_is_told():
    told = words(stats_of(cycle(0), cycle(0), is_masking=True))
    assert "a token 2.50 (effective density): no less than the dense model needs, with 6 tokens rolled back" in told
    assert "what drafts dropped was computed all the same, so that dropping it saved no time" in told
    assert "computed all the same" not in words(stats_of(cycle(0)))


def test_trees_and_lookups_are_told_of():
    tree = dataclasses.replace(cycle(2), branches=Branches(((0, 1, 2),), ((0.5,) * 3,), 0, 9, 7, 2))
    assert "9 tokens drafted, 7 verified; branches made advances 50% longer" in words(stats_of(tree))
    told = words(stats_of(cycle(2, num_steps=0, is_lookup=True), cycle(1)))
    assert "looked up the drafts of 1 cycle, in the text before" in told and "trees" not in told


@st.composite
def some_cycle(draw) -> Cycle:
    num_drafted = draw(st.integers(0, 5))
    seconds = st.floats(0, 10)
    return cycle(
        draw(st.integers(0, num_drafted)), num_drafted, draw(st.booleans()), is_lookup=draw(st.booleans()),
        num_steps=draw(st.integers(0, num_drafted)), draft_seconds=draw(seconds), verification_seconds=draw(seconds),
    )  # fmt: skip


@given(cycles=st.lists(some_cycle(), max_size=8), density=st.none() | st.floats(0.01, 1), masks=st.booleans())
def test_any_call_has_a_summary_and_only_a_measured_one_a_verdict(cycles, density, masks):
    stats = stats_of(*cycles, kernel_size="auto", density=density, is_masking=masks)
    for one in (stats, stats.total):
        told = str(one)
        assert told and "None" not in told and "nan" not in told
        assert all(len(line) <= 80 for line in told.splitlines())
        assert "saved time:" not in told or one.dense_step_seconds > 0
        assert re.sub(r"<[^>]*>", "", one._repr_html_())


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.texts, self.tags = [], []

    def handle_data(self, data):
        self.texts.append(data)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)


def test_a_notebook_shows_the_same_words_and_no_markup_of_others():
    stats = stats_of(cycle(3))
    stats.reason = "<script>alert('&')</script>"
    page = Text()
    page.feed(stats._repr_html_())
    assert "".join(page.texts).replace(" ", "") == "".join(str(stats).split())
    assert set(page.tags) == {"p", "strong", "table", "tr", "th", "td"}


def test_a_calls_own_statistics_can_be_printed_while_it_runs_and_when_it_fails():
    seen = []

    def stop(input_ids, scores, **kwargs):
        seen.append(str(twin.stats))
        if len(twin.stats.cycles) == 2:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)

    with make_sparse(shared_model(), method="griffin", kernel_size=3) as twin:
        with pytest.raises(KeyboardInterrupt):
            twin.dense_model.generate(
                make_prompt(), assistant_model=twin, max_new_tokens=20, do_sample=False, stopping_criteria=[stop]
            )
        assert "in 2 cycles with drafts" in str(twin.stats) and any("in 1 cycle with drafts" in told for told in seen)
        assert twin.stats.seconds()["draft"] == sum(one.draft_seconds for one in twin.stats.cycles) > 0


def test_dense_steps_are_counted_as_they_run():
    with make_sparse(shared_model(), method="griffin", kernel_size="auto") as twin:
        twin.dense_model.generate(make_prompt(), assistant_model=twin, max_new_tokens=30, do_sample=False)
        steps = [one for one in twin.stats.cycles if not one.drafted_ids]
        assert len(steps) == twin.stats.num_dense_steps == twin.stats.total.num_dense_steps > 0
        assert "dense step" in str(twin.stats) and twin.stats.reason.split()[0] in str(twin.stats)
