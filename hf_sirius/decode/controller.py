"""How many tokens a cycle drafts, where `kernel_size="auto"`: as many as promise the least time per token, or none."""

import math

from transformers import PreTrainedModel

from ..settings.config import SiriusConfig
from .costs import PATIENCE, costs_of
from .stats import Cycle


LONGEST = 31  # tokens of a draft
_FIRST = 1  # token of a draft of which nothing is known
_PROBE = 2  # tokens by which a draft that lost is tried again
_LONGEST_WAIT = 256  # tokens
_FURTHER = 2  # times as many tokens as were measured may be verified
_CLEARLY = 0.98  # of the time of a dense step, from which a draft is worth its while


class Controller:
    """Chooses for each cycle of one call, from what forwards took and how many tokens were kept so far, in this call
    and in those before it.

    A draft of n tokens takes n steps and a verification, and advances by (1 - a^(n + 1)) / (1 - a) tokens on average,
    where a is the share of tokens that are kept as long as all before them were. A draft that promises no less time
    per token than a dense step is left for a while, then tried by a short one, then left for twice as long.

    What the full model keeps does not depend on any of it. At a threshold of 1.0 a greedy output is the same whatever
    is chosen; a sampled one has the same distribution.
    """

    def __init__(self, model: PreTrainedModel, config: SiriusConfig):
        self.costs, self.record = costs_of(model, config)
        self.reason: str | None = None  # of the latest choice, in words
        self.is_selected = False  # whether neurons were chosen in this call

    def num_tokens(self, most: int) -> int:
        """Returns how many tokens, of at most so many before the call ends, the next cycle drafts; maybe none."""
        record = self.record
        if most < 1:
            return 0
        if self.costs.of(1) is None:
            self.reason = "a dense step is measured"
            return 0
        if record.waiting:
            record.waiting -= 1
            return 0
        if record.step.median is None:
            self.reason = "a draft is measured"
            return min(_FIRST, most)
        longest = self._best(most)
        if longest:
            record.patience, record.is_probing = PATIENCE, False
            self.reason = f"drafts of {longest}: {self._told()}"
            return longest
        if record.is_probing:
            record.is_probing = False
            return min(_PROBE, most)
        self.reason = f"drafting given up for {record.patience} tokens: {self._told()}"
        record.waiting, record.is_probing = record.patience - 1, True
        record.patience = min(2 * record.patience, _LONGEST_WAIT)
        return 0

    def _best(self, num_left: int) -> int:
        """Returns how many drafted tokens promise the least time per token; none where a dense step does."""
        dense, step = self.costs.of(1), self.record.step.median
        acceptance, nodes_per_step = self.record.acceptance, self.record.nodes_per_step
        # What a verification of many more tokens takes is not known.
        most = min(num_left, LONGEST, math.ceil(_FURTHER * self.costs.most_tokens / nodes_per_step))
        best, least, advance = 0, _CLEARLY * dense, 1.0
        for num_tokens in range(1, most + 1):
            advance += acceptance**num_tokens
            verification = self.costs.of(1 + num_tokens * nodes_per_step)
            seconds = (num_tokens * step + verification) / advance
            if seconds < least:
                best, least = num_tokens, seconds
        selection = 0.0 if self.is_selected else self.record.selection.median or 0.0
        return best if (dense - least) * num_left > selection else 0

    def _told(self) -> str:
        share = self.record.step.median / self.costs.of(1)
        return f"a draft step costs {share:.2f} of a dense one, and {self.record.acceptance:.2f} of its tokens are kept"

    def note_selection(self, seconds: float) -> None:
        """Takes note of what choosing and gathering neurons took in this call."""
        self.is_selected = True
        self.record.selection.note(seconds)

    def note(self, cycle: Cycle) -> None:
        """Takes note of a cycle."""
        num_read = 1 + (len(cycle.drafted_ids) if cycle.branches is None else cycle.branches.num_nodes_verified)
        self.costs.note(num_read, cycle.verification_seconds)
        if not cycle.num_steps:
            return
        self.record.step.note(cycle.draft_seconds / cycle.num_steps)
        num_drafted = len(cycle.drafted_ids)
        if num_drafted:  # else EOS or a criterion would have come first
            self.record.nodes_per_step = max(1.0, (num_read - 1) / cycle.num_steps)
            self.record.note(cycle.num_accepted, is_rejected=cycle.num_accepted < num_drafted)
