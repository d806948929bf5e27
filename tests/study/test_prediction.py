"""The prediction of what a generation takes, against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_sirius import SiriusConfig
from hf_sirius.decode.stats import Cycle
from hf_sirius.study.prediction import Costs, expected_events, match_rates, survival


def play(matches: list[bool], kernel_size: int, max_tokens: int) -> list[Cycle]:
    """Returns the cycles of an output behind its first token, as drafting.py would make them.

    Args:
        matches: of each token, whether the draft writes the same one.
        max_tokens: the length that is allowed; a shorter output ended with EOS.
    """
    cycles, start = [], 0
    while start < len(matches):
        allowed = min(kernel_size - 1, max_tokens - start - 1)
        num_drafted = num_accepted = 0
        steps = 0
        for i in range(allowed):
            steps += 1
            is_eos = start + i == len(matches) - 1
            agrees = all(matches[start : start + i])
            if agrees and is_eos:
                break  # the draft writes EOS, which it leaves to the full model
            num_drafted += 1
            num_accepted += agrees and matches[start + i]
        is_full = num_drafted == kernel_size - 1
        ids = tuple(range(num_drafted))
        cycle = Cycle(ids, num_accepted, 0, is_full, (0.5,) * num_drafted, 0.5, num_accepted)
        cycles.append((cycle, steps))
        start += num_accepted + 1
    return cycles


@given(
    matches=st.lists(st.booleans(), max_size=30),
    kernel_size=st.integers(2, 12),
    room=st.integers(0, 15),
)
def test_known_matches_give_the_very_cycles(matches, kernel_size, room):
    max_tokens = len(matches) + room
    played = play(matches, kernel_size, max_tokens)
    num_steps, verifications = expected_events([float(m) for m in matches], kernel_size, max_tokens)
    sizes = [len(cycle.drafted_ids) + 1 for cycle, _ in played]
    assert num_steps == sum(steps for _, steps in played)
    assert verifications == {size: sizes.count(size) for size in set(sizes)}


@given(
    rates=st.lists(st.floats(0, 1), min_size=1, max_size=7),
    kernel_size=st.integers(2, 6),
    room=st.integers(0, 4),
)
def test_uncertain_matches_give_the_mean_over_all_outcomes(rates, kernel_size, room):
    max_tokens = len(rates) + room
    mean_steps, mean_sizes = 0.0, dict.fromkeys(range(1, kernel_size + 1), 0.0)
    for matches in itertools.product([False, True], repeat=len(rates)):
        share = np.prod([rate if match else 1 - rate for rate, match in zip(rates, matches, strict=True)])
        for cycle, steps in play(list(matches), kernel_size, max_tokens):
            mean_steps += share * steps
            mean_sizes[len(cycle.drafted_ids) + 1] += share
    num_steps, verifications = expected_events(rates, kernel_size, max_tokens)
    assert num_steps == pytest.approx(mean_steps)
    assert {size: verifications.get(size, 0.0) for size in mean_sizes} == pytest.approx(mean_sizes, abs=1e-9)


@given(matches=st.lists(st.booleans(), min_size=1, max_size=40), kernel_size=st.integers(2, 12))
def test_match_rates_are_what_cycles_saw(matches, kernel_size):
    played = [cycle for cycle, _ in play(matches, kernel_size, len(matches))]
    rates = match_rates(played)
    assert len(rates) == len(matches)
    place, known = 0, []
    for cycle in played:
        places = range(place, place + min(len(cycle.drafted_ids), cycle.num_accepted + 1))
        assert all(rates[i] == matches[i] for i in places)
        known += [matches[i] for i in places]
        place += cycle.advance_length
        if cycle.num_accepted == len(cycle.drafted_ids):
            assert rates[place - 1] is not None and 0 <= rates[place - 1] <= 1
    mean = sum(known) / len(known) if known else 0.0
    assert rates[-1] == pytest.approx(mean)  # which the length left to the full model


def cycle_of(num_drafted: int, num_accepted: int) -> Cycle:
    return Cycle((0,) * num_drafted, num_accepted, 0, True, (0.5,) * num_drafted, 0.5, num_accepted)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_survival_of_uncut_drafts_is_the_share_that_got_so_far(pairs):
    cycles = [cycle_of(9, max(pair)) for pair in pairs]
    shares = survival(cycles)
    for i, share in enumerate(shares):
        assert share == pytest.approx(sum(cycle.num_accepted > i for cycle in cycles) / len(cycles))
    assume(cycles)
    assert len(shares) == min(9, 1 + max(cycle.num_accepted for cycle in cycles))


def test_survival_counts_drafts_cut_short_as_far_as_they_went():
    # At the second token 2 of 4 drafts are left; one was cut short with its only token accepted.
    assert survival([cycle_of(3, 3), cycle_of(3, 0), cycle_of(1, 1), cycle_of(3, 1)]) == [0.75, 0.375, 0.375]
    assert survival([]) == survival([cycle_of(0, 0)]) == []


def test_the_predicted_time_is_the_sum_of_its_parts():
    costs = Costs(2.0, {4: 5.0, 8: 9.0}, {("griffin", 0.5, None): 0.5}, {("griffin", 0.5, None): 7.0})
    config = SiriusConfig(method="griffin", density=0.5)
    assert [costs.verification(n) for n in (1, 2, 4, 6, 8, 9)] == [2.0, 3.0, 5.0, 7.0, 9.0, 9.0]
    assert costs.decode_seconds(config, 10, {4: 3.0, 6: 1.5}) == 7.0 + 10 * 0.5 + 3 * 5.0 + 1.5 * 7.0
