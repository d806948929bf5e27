"""What forwards of a model and of its drafts take on this machine, by what ran lately."""

import collections
import statistics
import threading
import weakref

from transformers import PreTrainedModel

from ..settings.config import SiriusConfig


_NUM_LATEST = 9  # of which the median is taken
_NUM_SETTINGS = 16  # of which a model remembers how its drafts did
PRIOR_ACCEPTANCE, _PRIOR_TOKENS = 0.8, 2.0  # what is expected of a draft that has not been seen, and its weight
_FADING = 0.9  # the weight of a cycle's tokens in the next one
PATIENCE = 32  # tokens for which a losing draft is left at first


class _Seconds:
    """The latest of some measurements; where others follow soon without the first, which loads and compiles what is
    used for the first time.
    """

    def __init__(self, is_warm: bool = False):
        self._latest: collections.deque[float] = collections.deque(maxlen=_NUM_LATEST)
        self._is_warm = is_warm

    def note(self, seconds: float) -> None:
        if self._is_warm:
            self._latest.append(seconds)
        self._is_warm = True

    @property
    def median(self) -> float | None:
        return statistics.median(list(self._latest)) if self._latest else None


class ModelCosts:
    """Seconds of a dense model's forwards over a few tokens, as verifications make them."""

    def __init__(self):
        self._of_tokens: dict[int, _Seconds] = {}

    def note(self, num_tokens: int, seconds: float) -> None:
        self._of_tokens.setdefault(num_tokens, _Seconds()).note(seconds)

    def of(self, num_tokens: float) -> float | None:
        """Returns the seconds of a forward, `None` before any was measured. They lie on the straight line between the
        two numbers of tokens around it that were measured, and beyond the last on that through the last two. What is
        not known is taken to be cheap, so that it is tried.
        """
        known = sorted((n, cost) for n, s in list(self._of_tokens.items()) if (cost := s.median) is not None)
        if not known:
            return None
        if len(known) == 1 or num_tokens <= known[0][0]:
            return known[0][1]
        right = next((i for i, (n, _) in enumerate(known) if i and n >= num_tokens), len(known) - 1)
        (first, low), (second, high) = known[right - 1], known[right]
        slope = (high - low) / (second - first)
        if num_tokens > second:
            return high + max(slope, 0.0) * (num_tokens - second)
        return low + slope * (num_tokens - first)


class DraftRecord:
    """How drafts of some settings did: what a step takes, and how many tokens are kept. Kept from call to call.

    Attributes:
        accepted, rejected: tokens that verifications kept, and those at which they went on by themselves; what is long
            ago counts less.
        nodes_per_step: tokens that a verification reads for each draft step: more than one of trees.
        waiting: plain steps to come before a losing draft is tried again.
        patience: how many there will be the next time.
        is_probing: whether the wait is over, and the draft is to be tried.
    """

    def __init__(self):
        self.step, self.selection = _Seconds(), _Seconds(is_warm=True)
        self.accepted, self.rejected = 0.0, 0.0
        self.nodes_per_step = 1.0
        self.waiting, self.patience, self.is_probing = 0, PATIENCE, False

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that are kept, as long as all before them were."""
        seen = self.accepted + self.rejected
        return (self.accepted + PRIOR_ACCEPTANCE * _PRIOR_TOKENS) / (seen + _PRIOR_TOKENS)

    def note(self, num_accepted: int, is_rejected: bool) -> None:
        self.accepted = _FADING * self.accepted + num_accepted
        self.rejected = _FADING * self.rejected + is_rejected


_lock = threading.Lock()
_known: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[ModelCosts, dict]]" = weakref.WeakKeyDictionary()


def costs_of(model: PreTrainedModel, config: SiriusConfig) -> tuple[ModelCosts, DraftRecord]:
    """Returns what is known of a model, which all its twins share, and of its drafts of these settings."""
    key = (*config.to_dict().items(), id(config.calibration))
    with _lock:
        costs, records = _known.setdefault(model, (ModelCosts(), {}))
        record = records.pop(key, None) or DraftRecord()
        records[key] = record  # the latest is the last
        while len(records) > _NUM_SETTINGS:
            del records[next(iter(records))]
    return costs, record
