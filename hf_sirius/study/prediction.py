"""What a generation takes, from what its parts take and how far drafts are accepted."""

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
    """Returns for each token of an output, but for its first one, how probably it is accepted where it is drafted.

    That is known, 0 or 1, of all tokens that were drafted here. Of one that followed an accepted draft as the full
    model's own it is the share of accepted ones among those known (0 if there is none).
    """
    rates: list[float | None] = []
    for cycle in cycles:
        is_known = cycle.num_accepted < len(cycle.drafted_ids)
        rates += [1.0] * cycle.num_accepted + [0.0 if is_known else None]
    known = [rate for rate in rates if rate is not None]
    mean = statistics.fmean(known) if known else 0.0
    return [mean if rate is None else rate for rate in rates]


def expected_events(rates: Sequence[float], kernel_size: int, max_tokens: int) -> tuple[float, dict[int, float]]:
    """Returns how many draft steps an output takes, and how many verifications by their number of tokens, on average.

    Cycles are played over the output, from wherever one may begin. Whether a token would be accepted is taken to be
    independent of the others, and of where its cycle began.

    Args:
        rates: for each token of the output behind its first one, the probability that it is accepted if drafted.
        kernel_size: tokens per cycle.
        max_tokens: how many the length would have allowed behind the first one; where the output has fewer, an EOS
            ended it, before which a draft stops, if it comes to it.
    """
    begins = np.zeros(len(rates) + 1)  # the probability that a cycle begins at each token
    begins[0] = 1.0
    num_steps, verifications = 0.0, Counter()
    for start, share in enumerate(begins[:-1]):  # grows meanwhile
        num_left = len(rates) - start
        num_drafted = min(kernel_size - 1, max_tokens - start - 1)
        reaches = float(share)  # the probability of a draft from here whose tokens were accepted so far
        for i in range(min(num_drafted, num_left - 1)):
            begins[start + i + 1] += reaches * (1 - rates[start + i])
            reaches *= rates[start + i]
        if num_drafted >= num_left:  # it comes to the EOS, which costs a step
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
    """What the parts of a generation take on this machine, medians in seconds.

    Attributes:
        dense_step: one token of the dense model.
        verifications: a forward of the dense model over so many tokens, and the loop's work up to the next draft.
        draft_steps: one drafted token, by method and density.
        selections: choosing and gathering the neurons after the prefill, by method and density.
    """

    dense_step: float
    verifications: dict[int, float]
    draft_steps: dict[tuple[str, float], float]
    selections: dict[tuple[str, float], float]

    def verification(self, num_tokens: int) -> float:
        """Returns the seconds of a verification, between the sizes that were timed by interpolation."""
        known = {1: self.dense_step, **self.verifications}
        return float(np.interp(num_tokens, sorted(known), [known[size] for size in sorted(known)]))

    def decode_seconds(self, config: SiriusConfig, num_steps: float, verifications: Mapping[int, float]) -> float:
        """Returns what an output takes behind its first token, from what `expected_events` counts."""
        setting = config.method, config.density
        verifying = sum(number * self.verification(size) for size, number in verifications.items())
        return self.selections[setting] + num_steps * self.draft_steps[setting] + verifying
