"""How many tokens a cycle drafts or looks up, where `kernel_size="auto"`: as many as promise the least time per token,
or none.
"""

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from ..settings.config import SiriusConfig
from .costs import KeptRecord, costs_of
from .stats import Cycle


LONGEST = 31  # tokens of a draft
_FIRST = 1  # token of a draft of which nothing is known
_PROBE = 2  # tokens by which a draft that lost is tried again
_LONGEST_RUN = 32  # cycles of looked up tokens, behind which the draft is asked again
_FURTHER = 2  # times as many tokens as were measured may be verified
_FEW = 2  # drafts, of which their time per token is known
_CLEARLY = 0.98  # of the time of a dense step, from which a draft is worth its while


class Controller:
    """Chooses for each cycle of one call, from what forwards took and how many tokens were kept so far, in this call
    and in those before it.

    A draft of n tokens takes n steps and a verification, of a model with recurrent states also what bringing these to
    the accepted length takes where a token is rejected, and advances by (1 - a^(n + 1)) / (1 - a) tokens on average,
    where a is the share of tokens that are kept as long as all before them were. A draft that promises no less time
    per token than a dense step is left for a while, then tried by a short one, then left for twice as long.

    A chain ends in doubt: it is drafted on as long as some number of tokens more is worth what they take. How likely
    the tokens so far are to be kept tells the margin by which the draft preferred each to the next likely one.

    Looked up tokens are a draft whose steps take nothing: they are taken where they promise less time than both.

    What the full model keeps does not depend on any of it. At a threshold of 1.0 a greedy output is the same whatever
    is chosen; a sampled one has the same distribution.
    """

    def __init__(self, model: PreTrainedModel, config: SiriusConfig):
        self.costs, self.record = costs_of(model, config)
        self.reason: str | None = None  # of the latest choice, in words
        self.is_selected = False  # whether neurons were chosen in this call
        self._is_tree = config.tree_width > 1
        self._worth = math.inf  # seconds that a token of the running draft may take
        self._most_drafted = 0  # tokens that it may have

    def num_tokens(self, most: int) -> int:
        """Returns how many tokens, of at most so many before the call ends, the next cycle drafts; maybe none."""
        record = self.record
        self._worth = math.inf
        if most < 1:
            return 0
        if self.costs.of(1) is None:
            self.reason = "a dense step is measured"
            return 0
        if record.waiting:
            record.num_lookups = 0
            record.wait()
            self.reason = self._given_up()
            return 0
        if record.step.median is None:
            self.reason = "a draft is measured"
            return min(_FIRST, most)
        if self.costs.wants_dense_step:
            return 0
        record.num_lookups = 0
        longest, least = self._best(most)
        if longest:
            record.take()
            if self._is_tree or longest >= self.costs.most_tokens:  # of so many nobody knows what they take
                self.reason = f"drafts of {longest}: {self._told()}"
                return longest
            self._worth, self._most_drafted = least, int(self._most(most))
            self.reason = f"drafts that end in doubt: {self._told()}"
            return self._most_drafted
        if record.is_probing:
            record.is_probing = False
            self.reason = f"a draft is tried again: {self._told()}"
            return min(_PROBE, most)
        if not self._best(math.inf)[0]:  # few tokens before the call's end say nothing about the draft
            record.leave()
            self.reason = self._given_up()
        return 0

    def goes_on(self, margins: Sequence[float]) -> bool:
        """Whether a draft is to have more tokens, behind those with these margins, at least one. Any number of them may
        be worth it: the next one alone may not, as the second token of a verification often costs the most.
        """
        if self._worth == math.inf:  # a short one, of which something is to be learnt
            return True
        record, step = self.record, self.record.step.median
        acceptance, rereading = record.acceptance, record.rereading.median or 0.0
        so_far = are_kept = math.prod(map(record.acceptance_of, margins))
        gain = self.costs.of(1 + len(margins))
        for num in range(len(margins) + 1, self._most_drafted + 1):
            are_kept *= acceptance
            gain += are_kept * self._worth - step
            if gain > self.costs.of(1 + num) + (so_far - are_kept) * rereading:
                return True
        return False

    def looks_up(self) -> bool:
        """Whether the text is to be searched for what may follow, in this cycle. The draft is measured, and tried
        again, before.
        """
        record, lookups = self.record, self.record.lookups
        if self.costs.of(1) is None or record.step.median is None or (record.is_probing and not record.waiting):
            return False
        if record.num_lookups >= _LONGEST_RUN:
            return False
        if lookups.waiting:
            lookups.wait()
            return False
        return True

    def num_looked_up(self, num_found: int, num_sought: int) -> int:
        """Returns how many of the tokens that were found are proposed in place of a draft; maybe none.

        Args:
            num_found: at least one.
            num_sought: how many are found where the text goes on.
        """
        record, lookups = self.record, self.record.lookups
        least = _CLEARLY * self.costs.of(1)
        if not record.waiting:
            least = min(least, self._best(math.inf)[1])
        ahead = lookups.search.median or 0.0
        best, _ = self._least(num_found, lookups, ahead, 0.0, 1.0, least)
        if best:
            lookups.take()
        elif lookups.is_probing:
            lookups.is_probing, best = False, min(_PROBE, num_found)
        elif not self._least(num_sought, lookups, ahead, 0.0, 1.0, least)[0]:
            lookups.leave()
        if best:
            if record.waiting:
                record.wait()
            record.num_lookups += 1
            self.reason = f"{best} looked up in the text: {lookups.acceptance:.2f} of such tokens are kept"
        return best

    def _best(self, num_left: float) -> tuple[int, float]:
        """Returns how many drafted tokens promise the least time per token, and that; none where a dense step does."""
        dense, record = self.costs.of(1), self.record
        best, least = self._least(num_left, record, 0.0, record.step.median, record.nodes_per_step, _CLEARLY * dense)
        if num_left > 1 and not self._is_tree and (lately := self._lately()) < least:
            best, least = max(best, 1), lately
        selection = 0.0 if self.is_selected or not best else record.selection.median or 0.0
        return (best, least) if (dense - least) * num_left > selection else (0, _CLEARLY * dense)

    def _lately(self) -> float:
        """Returns the seconds per token of drafts that end in doubt, as they ended lately."""
        num_drafts, num_rejected, num_steps, num_added = self.record.of_drafts
        if num_drafts < _FEW:
            return math.inf
        rereading = num_rejected * (self.record.rereading.median or 0.0)
        seconds = num_steps * self.record.step.median + num_drafts * self.costs.of(1 + num_steps / num_drafts)
        return (seconds + rereading) / num_added

    def _most(self, num_tokens: float, nodes_per_step: float = 1.0) -> float:
        """Returns how many of so many tokens may be proposed: what a verification of many more takes is not known."""
        return min(num_tokens, LONGEST, math.ceil(_FURTHER * self.costs.most_tokens / nodes_per_step))

    def _least(
        self, num_tokens: float, record: KeptRecord, ahead: float, step: float, nodes_per_step: float, least: float
    ) -> tuple[int, float]:
        """Returns how many of so many tokens promise the least seconds per token, and these; none if not below `least`.

        Args:
            record: of the tokens' kind.
            ahead, step: seconds that a proposal takes, and each of its tokens.
            nodes_per_step: how many a verification reads for each.
        """
        rereading = self.record.rereading.median or 0.0  # behind a rejection
        acceptance, best, advance = record.acceptance, 0, 1.0
        for num in range(1, int(self._most(num_tokens, nodes_per_step)) + 1):
            advance += acceptance**num
            is_rejected = 1 - acceptance**num  # the likelihood of it
            verification = self.costs.of(1 + num * nodes_per_step) + is_rejected * rereading
            seconds = (ahead + num * step + verification) / advance
            if seconds < least:
                best, least = num, seconds
        return best, least

    def _given_up(self) -> str:
        return f"drafting given up for {self.record.left_for} cycles: {self._told()}"

    def _told(self) -> str:
        share = self.record.step.median / self.costs.of(1)
        return f"a draft step costs {share:.2f} of a dense one, and {self.record.acceptance:.2f} of its tokens are kept"

    def note_selection(self, seconds: float) -> None:
        """Takes note of what choosing and gathering neurons took in this call."""
        self.is_selected = True
        self.record.selection.note(seconds)

    def note(self, cycle: Cycle, margins: Sequence[float] = ()) -> None:
        """Takes note of a cycle; `margins` are those of its tokens, where the draft is a chain."""
        num_read = 1 + (len(cycle.drafted_ids) if cycle.branches is None else cycle.branches.num_nodes_verified)
        self.costs.note(num_read, cycle.verification_seconds)
        if cycle.num_accepted < len(cycle.drafted_ids):
            self.record.rereading.note(cycle.state_seconds)
        lookups = self.record.lookups
        if not cycle.is_lookup and lookups.waiting:  # for the model's own token it did already
            lookups.wait(cycle.num_accepted)
        if cycle.is_lookup:
            lookups.search.note(cycle.draft_seconds)
            lookups.note(cycle.num_accepted, is_rejected=cycle.num_accepted < len(cycle.drafted_ids))
        if not cycle.num_steps:
            return
        self.record.step.note(cycle.draft_seconds / cycle.num_steps)
        num_drafted = len(cycle.drafted_ids)
        if num_drafted:  # else EOS or a criterion would have come first
            self.record.nodes_per_step = max(1.0, (num_read - 1) / cycle.num_steps)
            self.record.note(cycle.num_accepted, is_rejected=cycle.num_accepted < num_drafted)
            if cycle.is_full:
                is_rejected = cycle.num_accepted < num_drafted
                self.record.note_draft(cycle.num_steps, margins, cycle.num_accepted, is_rejected)
