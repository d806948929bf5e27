"""What forwards of a model and of its drafts take on this machine, by what ran lately."""

import bisect
import collections
import math
import statistics
import threading
import weakref
from collections.abc import Sequence

from transformers import PreTrainedModel

from ..settings.config import SiriusConfig


_NUM_LATEST = 33  # of which the median is taken: other work on a machine comes in bursts
_CHEAP_TOKENS = 8
_NUM_SETTINGS = 16  # of which a model remembers how its drafts did
_PRIOR_ACCEPTANCE, _PRIOR_OF_LOOKUPS = 0.8, 0.5  # of tokens that have not been seen
_FADING, _FADING_OF_ALL = 0.98, 0.999  # what a token counts when the next one is seen: lately, and altogether
_MARGINS = (0.1, 0.2, 0.4, 0.8, 1.6)  # between kinds of tokens, in nats
_PRIOR_TOKENS = 4  # for which counts what is known beforehand
_FADING_OF_MARGINS = 0.995
_PATIENCE, _LONGEST_WAIT = 32, 256  # tokens for which a losing draft is left at first, and at most
_CYCLES_PER_STEP = 4  # for each known step of the model alone, until another one is measured
_MOST_STEPS = 8  # that count there
_FEWEST = 3  # measurements of which the median is no chance
_FEW_LATEST = 3  # proposals that may be of another text than those before
_SURPRISE = 6.0  # nats by which they are likelier by a share of their own than by the one that was expected
_TAKEN = 8  # cycles in which a draft is taken for its own sake, until that it had lost is forgotten


class _Seconds:
    """The latest of some measurements; where others follow soon without the first, which loads and compiles what is
    used for the first time.

    Attributes:
        median: of them, `None` without any.
        num: of how many.
    """

    def __init__(self, is_warm: bool = False):
        self._latest: collections.deque[float] = collections.deque(maxlen=_NUM_LATEST)
        self._is_warm = is_warm
        self.median: float | None = None

    @property
    def num(self) -> int:
        return len(self._latest)

    def note(self, seconds: float) -> None:
        if self._is_warm:
            self._latest.append(seconds)
            self.median = statistics.median(list(self._latest))
        self._is_warm = True


class ModelCosts:
    """Seconds of a dense model's forwards over a few tokens, as verifications make them."""

    def __init__(self):
        self._of_tokens: dict[int, _Seconds] = {}
        # Numbers of tokens that are known, and the seconds of each: one object, as other threads read it meanwhile.
        self._known: tuple[list[int], list[float]] = ([], [])
        self._num_since = 0  # forwards over several tokens since one over a single one

    def note(self, num_tokens: int, seconds: float) -> None:
        if seconds <= 0:  # another thread has compiled meanwhile, which is taken off
            return
        self._of_tokens.setdefault(num_tokens, _Seconds()).note(seconds)
        self._num_since = 0 if num_tokens == 1 else self._num_since + 1
        known = sorted((n, of_n) for n, of_n in list(self._of_tokens.items()) if of_n.median is not None)
        seconds_of = [of_n.median for _, of_n in known]
        if known and known[0][0] == 1:
            # One token takes no longer than several. If it did, other work came between.
            seconds_of[0] = min(seconds_of[0], *(of_n.median for _, of_n in known if of_n.num >= _FEWEST), math.inf)
        self._known = [n for n, _ in known], seconds_of

    def of(self, num_tokens: float) -> float | None:
        """Returns the seconds of a forward, `None` before any was measured.

        Between numbers of tokens that were measured they lie on a straight line. More than the most of them are taken
        to be cheap, so that they are tried: up to 8 tokens as cheap as that, as often the second token costs much and
        the next ones little, and beyond at half the price of those before.
        """
        places, medians = self._known
        if not places:
            return None
        if num_tokens > places[-1]:
            price = (medians[-1] - medians[0]) / (places[-1] - places[0]) if len(places) > 1 else 0.0
            return medians[-1] + max(0.0, price / 2) * max(0.0, num_tokens - max(places[-1], _CHEAP_TOKENS))
        if num_tokens <= places[0]:
            return medians[0]
        i = bisect.bisect_left(places, num_tokens)
        share = (num_tokens - places[i - 1]) / (places[i] - places[i - 1])
        return medians[i - 1] + (medians[i] - medians[i - 1]) * share

    @property
    def most_tokens(self) -> int:
        """Returns the most tokens of which the seconds were measured."""
        places, _ = self._known
        return places[-1] if places else 0

    @property
    def wants_dense_step(self) -> bool:
        """Whether a forward over a single token is to be measured again: soon where few were."""
        num_known = self._of_tokens[1].num if 1 in self._of_tokens else 0
        return self._num_since > _CYCLES_PER_STEP * min(1 + num_known, _MOST_STEPS)


class KeptRecord:
    """How many proposed tokens of one kind were kept, and when those that lose are tried again.

    Args:
        prior: the share of tokens that are kept, where none was seen.

    Attributes:
        accepted, rejected: tokens that verifications kept, and those at which they went on by themselves, of the latest
            text; what is long ago counts less.
        all_accepted, all_rejected: the same, where it counts for much longer.
        waiting: tokens to come before a losing proposal is tried again.
        left_for: how many there were in all.
        patience: how many there will be the next time.
        is_probing: whether the wait is over, and it is to be tried.
        num_taken: cycles in which it was chosen for its own sake, since it was left.
    """

    def __init__(self, prior: float):
        self.prior = prior
        self.accepted, self.rejected, self.all_accepted, self.all_rejected = 0.0, 0.0, 0.0, 0.0
        self.waiting, self.left_for, self.patience, self.is_probing = 0, 0, _PATIENCE, False
        self.num_taken = 0
        self._latest: collections.deque[tuple[int, bool]] = collections.deque(maxlen=_FEW_LATEST)

    @property
    def acceptance(self) -> float:
        """The share of proposed tokens that are kept, as long as all before them were: of the latest text, and as far
        as little is known of that, of all.
        """
        # Read once: another thread may change them meanwhile.
        accepted, rejected, all_accepted, all_rejected = (
            self.accepted, self.rejected, self.all_accepted, self.all_rejected
        )  # fmt: skip
        of_all = (all_accepted + self.prior) / (all_accepted + all_rejected + 1)
        return (accepted + _PRIOR_TOKENS * of_all) / (accepted + rejected + _PRIOR_TOKENS)

    def leave(self) -> None:
        """Leaves it for a while, and the next time for twice as long."""
        self.left_for, self.waiting, self.is_probing, self.num_taken = self.patience, self.patience - 1, True, 0
        self.patience = min(2 * self.patience, _LONGEST_WAIT)
        self._latest.clear()

    def wait(self, num_tokens: int = 1) -> None:
        """Lets tokens of the output pass without it: what is known is of a text that gets longer ago."""
        self.waiting, fading = max(0, self.waiting - num_tokens), _FADING**num_tokens
        self.accepted, self.rejected = fading * self.accepted, fading * self.rejected

    def take(self) -> None:
        """Takes note of a choice for its own sake; just behind a wait it may be by what held before, and in vain."""
        self.num_taken, self.is_probing = self.num_taken + 1, False
        if self.num_taken >= _TAKEN:
            self.patience = _PATIENCE

    def note(self, num_accepted: int, is_rejected: bool) -> None:
        """Takes note of a proposal. Where the latest few did so badly that they are of another text, what was known is
        forgotten: it would fade by tokens, of which each takes a cycle where none is kept.
        """
        self._latest.append((num_accepted, is_rejected))
        accepted, rejected = num_accepted, int(is_rejected)
        if is_rejected and (latest := self._of_another_text()):
            self._forget()
            accepted, rejected = latest
        fading = _FADING ** (accepted + rejected)
        self.accepted = fading * self.accepted + accepted
        self.rejected = fading * self.rejected + rejected
        fading = _FADING_OF_ALL ** (num_accepted + is_rejected)
        self.all_accepted = fading * self.all_accepted + num_accepted
        self.all_rejected = fading * self.all_rejected + is_rejected

    def _of_another_text(self) -> tuple[int, int] | None:
        """Returns the tokens kept, and those rejected, of the latest proposals where these are of a worse text than
        those before; else `None`.
        """
        expected = min(self.acceptance, _FADING)  # some fifty tokens tell of no larger share
        accepted, rejected = 0, 0
        for num_accepted, is_rejected in reversed(list(self._latest)):
            accepted, rejected = accepted + num_accepted, rejected + is_rejected
            if _surprise(accepted, rejected, expected) > _SURPRISE:
                return accepted, rejected
        return None

    def _forget(self) -> None:
        """Forgets what is known of a text, and keeps what is known of all."""
        self.accepted, self.rejected = 0.0, 0.0


def _surprise(accepted: int, rejected: int, expected: float) -> float:
    """Returns the nats by which so many tokens kept, and not, are likelier by their own share of those kept than by the
    one expected; 0 where that is no larger.
    """
    num = accepted + rejected
    if accepted >= expected * num:
        return 0.0
    of_accepted = accepted * math.log(accepted / (num * expected)) if accepted else 0.0
    return of_accepted + rejected * math.log(rejected / (num * (1 - expected)))


class LookupRecord(KeptRecord):
    """How those tokens did that were looked up in place of a draft: how many are kept, and what a search takes."""

    def __init__(self, prior: float):
        super().__init__(prior)
        self.search = _Seconds()


class DraftRecord(KeptRecord):
    """How drafts of some settings did: what a step takes, and how many tokens are kept. Kept from call to call.

    Attributes:
        rereading: what bringing recurrent states to the accepted length takes, where a token was rejected.
        nodes_per_step: tokens that a verification reads for each draft step: more than one of trees.
        of_drafts: drafts that ended by themselves, those of them that were not kept whole, their steps, and the tokens
            by which the output grew; what is long ago counts less. One object, as other threads read it meanwhile.
        lookups: how looked up tokens did.
        num_lookups: cycles in which they were taken since the draft was last asked.
    """

    def __init__(self):
        super().__init__(_PRIOR_ACCEPTANCE)
        self.step, self.selection, self.rereading = _Seconds(), _Seconds(is_warm=True), _Seconds(is_warm=True)
        self.nodes_per_step = 1.0
        self._forget()
        self.lookups, self.num_lookups = LookupRecord(_PRIOR_OF_LOOKUPS), 0

    def acceptance_of(self, margin: float) -> float:
        """Returns the share that is kept of the tokens with about this margin, by which the draft preferred them to the
        next likely one, in nats.
        """
        num_kept, num_judged = self._of_margins[bisect.bisect(_MARGINS, margin)]
        return (num_kept + _PRIOR_TOKENS * self.acceptance) / (num_judged + _PRIOR_TOKENS)

    def _forget(self) -> None:
        super()._forget()
        self.of_drafts: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
        self._of_margins = [(0.0, 0.0) for _ in range(len(_MARGINS) + 1)]  # tokens kept, and judged

    def note_draft(self, num_steps: int, margins: Sequence[float], num_accepted: int, is_rejected: bool) -> None:
        """Takes note of a draft that ended by itself, and of which so many tokens were kept, each with its margin."""
        fading = _FADING ** (num_accepted + 1)
        added = (1, is_rejected, num_steps, num_accepted + 1)
        self.of_drafts = tuple(fading * old + new for old, new in zip(self.of_drafts, added, strict=True))
        of_margins = self._of_margins
        for i, margin in enumerate(margins[: num_accepted + 1]):  # behind the first rejected one nothing was judged
            kind = bisect.bisect(_MARGINS, margin)
            num_kept, num_judged = of_margins[kind]
            of_margins[kind] = (
                _FADING_OF_MARGINS * num_kept + (i < num_accepted),
                _FADING_OF_MARGINS * num_judged + 1,
            )


_lock = threading.Lock()
_known: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[dict, dict]]" = weakref.WeakKeyDictionary()


def costs_of(model: PreTrainedModel, config: SiriusConfig) -> tuple[ModelCosts, DraftRecord]:
    """Returns what is known of a model, apart for twins that compile its verifications, and of its drafts of these
    settings.
    """
    key = (*config.to_dict().items(), id(config.calibration))
    with _lock:
        all_costs, records = _known.setdefault(model, ({}, {}))
        costs = all_costs.setdefault(config.compile_draft, ModelCosts())
        record = records.pop(key, None) or DraftRecord()
        records[key] = record  # the latest is the last
        while len(records) > _NUM_SETTINGS:
            del records[next(iter(records))]
    return costs, record
