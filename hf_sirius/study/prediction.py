"""Predicts how long a generation takes from the time of its parts and the acceptance of drafts."""

import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from ..decode.stats import Cycle
from ..settings.config import SiriusConfig


def survival(cycles: Sequence[Cycle]) -> list[float]:
    """Returns S(1), S(2), ...: the probability that the first i tokens of a draft are all accepted.

    The estimate of Kaplan and Meier (1958): a draft counts at each position that it reached, however early it was cut
    short. The list ends with the longest draft whose earlier tokens were accepted.
    """
    shares: list[float] = []
    for i in itertools.count():
        # Those that had a token here, and all before it accepted.
        reached = [c.num_accepted > i for c in cycles if i < len(c.drafted_ids) and i <= c.num_accepted]
        if not reached:
            return shares
        shares.append((shares[-1] if shares else 1.0) * sum(reached) / len(reached))


def match_rates(cycles: Sequence[Cycle]) -> list[float]:
    """Returns for each token of an output behind the first one the probability that it is accepted if drafted.

    A token that was drafted has 0 or 1. The full model's own token behind a draft that was accepted whole was not
    drafted; it has the share of accepted tokens among the drafted ones (0 if there is none).
    """
    rates: list[float | None] = []
    for cycle in cycles:
        is_known = cycle.num_accepted < len(cycle.drafted_ids)
        rates += [1.0] * cycle.num_accepted + [0.0 if is_known else None]
    known = [rate for rate in rates if rate is not None]
    mean = statistics.fmean(known) if known else 0.0
    return [mean if rate is None else rate for rate in rates]


def expected_events(rates: Sequence[float], kernel_size: int, max_tokens: int) -> tuple[float, dict[int, float]]:
    """Returns how many draft steps an output takes on average, and how many verifications of each number of tokens.

    A cycle may begin at any token of the output, with a probability that the cycles before it give. The acceptance of
    a token is taken to be independent of other tokens and of where its cycle began.

    Args:
        rates: for each token of the output behind its first one, the probability that it is accepted if drafted.
        kernel_size: tokens per cycle.
        max_tokens: how many the length would have allowed behind the first one; a shorter output was ended by an EOS,
            before which a draft stops that reaches it.
    """
    begins = np.zeros(len(rates) + 1)  # the probability that a cycle begins at each token
    begins[0] = 1.0
    num_steps, verifications = 0.0, Counter()
    for start, share in enumerate(begins[:-1]):  # a cycle adds to the shares behind its start
        num_left = len(rates) - start
        num_drafted = min(kernel_size - 1, max_tokens - start - 1)
        reaches = float(share)  # the probability of a draft from here whose tokens were accepted so far
        for i in range(min(num_drafted, num_left - 1)):
            begins[start + i + 1] += reaches * (1 - rates[start + i])
            reaches *= rates[start + i]
        if num_drafted >= num_left:  # the draft may reach the EOS, which costs a step
            num_steps += reaches * num_left
            verifications[num_left] += reaches
            share = share - reaches
        else:
            begins[start + num_drafted + 1] += reaches
        num_steps += share * num_drafted
        verifications[num_drafted + 1] += share
    return float(num_steps), {size: float(number) for size, number in sorted(verifications.items()) if number}


@dataclasses.dataclass(frozen=True)
class Costs:
    """How long the parts of a generation take on this machine, medians in seconds."""

    dense_step: float  # one token of the dense model
    # by number of tokens, a forward of the dense model over them and the work up to the next draft
    verifications: dict[int, float]
    # one drafted token, by method, density and dtype
    draft_steps: dict[tuple[str, float, str | None], float]
    # choosing and gathering the neurons after the prefill, likewise
    selections: dict[tuple[str, float, str | None], float]

    def verification(self, num_tokens: int) -> float:
        """Returns the seconds of a verification; sizes that were not timed are interpolated."""
        known = {1: self.dense_step, **self.verifications}
        return float(np.interp(num_tokens, sorted(known), [known[size] for size in sorted(known)]))

    def decode_seconds(self, config: SiriusConfig, num_steps: float, verifications: Mapping[int, float]) -> float:
        """Returns the seconds of an output behind its first token, from the counts of `expected_events`."""
        setting = config.method, config.density, config.draft_dtype
        verifying = sum(number * self.verification(size) for size, number in verifications.items())
        return self.selections[setting] + num_steps * self.draft_steps[setting] + verifying
