"""What happened in each cycle of a call, and the measures that follow from it."""

import dataclasses
import statistics
import threading
from collections.abc import Sequence
from typing import Any

from .summary import as_html, as_text, summarize


_COUNTS = (
    "num_cycles", "num_short_cycles", "num_dense_steps", "num_lookups", "num_steps", "num_compiled_steps",
    "num_compiled_verifications", "num_drafted", "num_accepted", "num_nodes_drafted", "num_nodes_verified",
    "num_reread", "_full_advance", "_full_drafted", "_full_likeliest_advance", "_num_densities", "_density_sum",
    "_num_masking", "selection_seconds", "draft_seconds", "verification_seconds", "state_seconds",
)  # fmt: skip
_ATTRIBUTES = {name.lstrip("_"): name for name in _COUNTS}
_FEWEST_STEPS = 3  # of which a median is no chance
_lock = threading.Lock()  # calls in several threads add to one total


@dataclasses.dataclass(frozen=True)
class Branches:
    """The tree of a draft with `tree_width` over 1.

    Attributes:
        leaf_ids: the tokens of each continuation, the likeliest to the draft first.
        leaf_likelihoods: the full model's likelihood of each of these tokens, as in [`Cycle`].
        winner: which of them was kept, or went furthest.
        num_nodes_drafted, num_nodes_verified: tokens that the draft wrote, and those of them that led to a
            continuation in the end, which are those that the full model read.
        likeliest_advance_length: what the advance would have been without branches.
    """

    leaf_ids: tuple[tuple[int, ...], ...]
    leaf_likelihoods: tuple[tuple[float | None, ...], ...]
    winner: int
    num_nodes_drafted: int
    num_nodes_verified: int
    likeliest_advance_length: int


@dataclasses.dataclass(frozen=True)
class Cycle:
    """One draft and its verification.

    Attributes:
        drafted_ids: the drafted tokens, in order; of a tree those of the continuation that won.
        num_accepted: how many of them, from the first on, the full model kept.
        bonus_id: the full model's own token, which follows the accepted ones.
        is_full: whether the draft ended by itself, after `kernel_size - 1` tokens or in doubt (`draft_confidence`), and
            was not cut by EOS, a stopping criterion or the length. Where it was, its advance says nothing about the
            draft's quality.
        likelihoods: the full model's likelihood of each drafted token, softmax(l / temperature) as the acceptance rule
            reads it; `None` for a token of a tree behind one that was not accepted, about which it was not asked.
        bonus_likelihood: that of its own token.
        num_agreed: how many of the accepted tokens are its argmax.
        num_steps: forwards of the draft.
        is_lookup: whether no draft wrote them: they are what followed the latest tokens where these stood before.
        num_reread: accepted tokens that the recurrent layers of the full model read again after a rejection, as their
            states cannot be cropped.
        draft_seconds, verification_seconds: what the two took, by the host's clock.
        state_seconds: what bringing the states of recurrent layers to the accepted length took.
        branches: of a tree, else `None`.
        num_compiled_steps, is_verification_compiled: how many forwards of the draft ran as one graph, and whether that
            of the full model did (`compile_draft`).
        kernel_size: one for each step of the draft or token that was looked up, and one for the full model's own: 1
            where nothing was proposed.
    """

    drafted_ids: tuple[int, ...]
    num_accepted: int
    bonus_id: int
    is_full: bool
    likelihoods: tuple[float | None, ...]
    bonus_likelihood: float
    num_agreed: int
    num_steps: int = 0
    is_lookup: bool = False
    draft_seconds: float = dataclasses.field(default=0.0, compare=False)
    verification_seconds: float = dataclasses.field(default=0.0, compare=False)
    num_reread: int = 0
    state_seconds: float = dataclasses.field(default=0.0, compare=False)
    branches: Branches | None = None
    num_compiled_steps: int = 0
    is_verification_compiled: bool = False
    kernel_size: int = 1

    @property
    def advance_length(self) -> int:
        """Tokens that the cycle added to the sequence: the accepted ones and the bonus token."""
        return self.num_accepted + 1

    @property
    def is_dense_step(self) -> bool:
        """Whether nothing was proposed, so that the verification is a step of the full model alone."""
        return not self.drafted_ids and not self.num_steps


def kernel_sizes(cycles: Sequence[Cycle]) -> list[int]:
    """Returns the `kernel_size` of each cycle, negative where its tokens were looked up."""
    return [-cycle.kernel_size if cycle.is_lookup else cycle.kernel_size for cycle in cycles]


class GenerationStats:
    """Counts of one `generate` call, kept while it runs; `total` has the same counts over all calls of the twin.

    Printed, and in a notebook, they are a summary in words; `as_dict` and `seconds` have the numbers.

    Attributes:
        kernel_size: tokens per cycle, n, a list of those of each cycle, or `"auto"`.
        kernel_sizes: the tokens of each cycle, as `"auto"` chose them: 1 where nothing was proposed, negative where
            they were looked up. A twin with `kernel_size=stats.kernel_sizes` chooses the same, and so writes the same
            below a threshold of 1, and when it samples with the same seed. The total has none.
        reason: why `"auto"` drafted as many tokens as it did in the latest cycle, or none, in words; else `None`.
        not_compiled: why the latest draft did not run as one graph, in words; `None` where it did, where
            `compile_draft` does not ask for it, and before any.
        first_id, first_likelihood: the full model's own token after the prefill, which precedes the cycles, and its
            likelihood as in [`Cycle`]; `None` before it, and in the total.
        selection_seconds: what choosing and gathering the neurons took behind the prefill; of the total, of all calls.
        draft_seconds, verification_seconds, state_seconds: what the cycles took that proposed tokens; the last is what
            bringing the states of recurrent layers to the accepted length took, behind the verifications.
        cycles: the [`Cycle`]s of the call, in order (the total keeps none).
        num_cycles: cycles, the short ones included; the prefill is not a cycle.
        num_short_cycles: cycles that EOS, a stopping criterion or the length cut short.
        num_dense_steps, num_lookups: cycles that proposed nothing, and those whose tokens were looked up.
        num_steps, num_compiled_steps: forwards of the draft, and how many of them ran as one graph.
        num_compiled_verifications: of the cycles' forwards of the full model, those that did.
        num_drafted, num_accepted, num_rolled_back: drafted tokens, and how many of them were kept and rolled back; of
            trees the continuations that won count.
        num_nodes_drafted, num_nodes_verified: tokens that drafts wrote, and that verifications read, losing branches
            included. Looked up tokens count as drafted.
        num_reread: accepted tokens that the recurrent layers of the full model read again, as in [`Cycle`].
    """

    num_cycles: int
    num_short_cycles: int
    num_dense_steps: int
    num_lookups: int
    num_steps: int
    num_compiled_steps: int
    num_compiled_verifications: int
    num_drafted: int
    num_accepted: int
    num_nodes_drafted: int
    num_nodes_verified: int
    num_reread: int
    selection_seconds: float
    draft_seconds: float
    verification_seconds: float
    state_seconds: float

    def __init__(self, kernel_size: "int | str | tuple[int, ...]", total: "GenerationStats | None" = None):
        self.kernel_size = kernel_size
        self.total = total
        self._clear()

    def reset(self) -> None:
        """Sets every count back to zero, those of the total included."""
        self._clear()
        if self.total is not None:
            self.total.reset()

    def _clear(self) -> None:
        self.first_id: int | None = None
        self.first_likelihood: float | None = None
        self.reason: str | None = None
        self.not_compiled: str | None = None
        self.cycles: list[Cycle] = []
        for name in _COUNTS:
            setattr(self, name, 0)

    def counts(self) -> dict[str, float]:
        """Returns all that the measures follow from, as plain numbers that `add_counts` takes."""
        return {name: getattr(self, attribute) for name, attribute in _ATTRIBUTES.items()}

    def add_counts(self, counts: dict[str, float]) -> None:
        """Adds the `counts()` of other calls to these, as to a total."""
        with _lock:
            for name, count in counts.items():
                if count and (attribute := _ATTRIBUTES.get(name)):
                    setattr(self, attribute, getattr(self, attribute) + count)

    def record_first(self, token_id: int, likelihood: float) -> None:
        """Notes the token that the full model wrote after the prefill."""
        self.first_id, self.first_likelihood = token_id, likelihood

    def record_selection(self, seconds: float) -> None:
        """Notes what choosing and gathering the neurons took."""
        self._record({"selection_seconds": seconds})

    def record_cycle(self, cycle: Cycle) -> None:
        """Adds a verified cycle to the counts, and to the total's."""
        self.cycles.append(cycle)
        num_drafted = len(cycle.drafted_ids)
        branches = cycle.branches or Branches((), (), 0, num_drafted, num_drafted, cycle.advance_length)
        counts = {
            "num_cycles": 1,
            "num_short_cycles": not cycle.is_full,
            "num_dense_steps": cycle.is_dense_step,
            "num_lookups": cycle.is_lookup,
            "num_steps": cycle.num_steps,
            "num_compiled_steps": cycle.num_compiled_steps,
            "num_compiled_verifications": cycle.is_verification_compiled,
            "num_drafted": num_drafted,
            "num_accepted": cycle.num_accepted,
            "num_nodes_drafted": branches.num_nodes_drafted,
            "num_nodes_verified": branches.num_nodes_verified,
            "num_reread": cycle.num_reread,
            "full_advance": cycle.advance_length * cycle.is_full,
            "full_drafted": num_drafted * cycle.is_full * (not cycle.is_lookup),
            "full_likeliest_advance": branches.likeliest_advance_length * cycle.is_full,
            "draft_seconds": cycle.draft_seconds * (not cycle.is_dense_step),
            "verification_seconds": cycle.verification_seconds * (not cycle.is_dense_step),
            "state_seconds": cycle.state_seconds,
        }
        self._record(counts)

    def record_draft_density(self, draft_density: float, is_masking: bool) -> None:
        """Notes the share of all parameters that the call's draft steps needed, on average, and whether they computed
        all the rest as well.
        """
        self._record({"num_densities": 1, "density_sum": draft_density, "num_masking": is_masking})

    def _record(self, counts: dict[str, float]) -> None:
        for stats in filter(None, (self, self.total)):
            stats.add_counts(counts)

    @property
    def kernel_sizes(self) -> list[int]:
        return kernel_sizes(self.cycles)

    @property
    def num_rolled_back(self) -> int:
        return self.num_drafted - self.num_accepted

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens, or `None` before any draft."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    @property
    def aal(self) -> float | None:
        """Average advance length (paper, section 4): mean of accepted + 1 over full cycles, or `None` without one."""
        num_full = self.num_cycles - self.num_short_cycles
        return self._full_advance / num_full if num_full else None

    @property
    def aal_gain(self) -> float | None:
        """What the branches of trees added to the AAL: AAL over what it would be without them - 1."""
        return self._full_advance / self._full_likeliest_advance - 1 if self._full_likeliest_advance else None

    @property
    def draft_density(self) -> float | None:
        """Parameters that a draft step needed, such as those of the kept neurons, / all parameters, measured when the
        call ends; of the total, the mean over calls. Where `is_masking`, it read the others all the same.
        """
        return self._density_sum / self._num_densities if self._num_densities else None

    @property
    def is_masking(self) -> bool | None:
        """Whether the draft computed all of what it dropped as well, so that dropping saved no time: always of teal,
        and of cats where for most tokens no kernel skipped rows of `up`. Of the total, in any call; `None` before the
        end of a first one.
        """
        return bool(self._num_masking) if self._num_densities else None

    @property
    def effective_density(self) -> float | None:
        """Parameters needed per token / all parameters: ((n - 1) * draft_density + 1) / AAL (paper, section 4), with
        the mean of what drafts wrote for n - 1 where they end early, or tokens are looked up.
        """
        num_full = self.num_cycles - self.num_short_cycles
        if not num_full or self.draft_density is None:
            return None
        return (self._full_drafted * self.draft_density + num_full) / self._full_advance

    @property
    def dense_step_seconds(self) -> float | None:
        """What a step of the full model alone took, the median of those of this call behind its first one, which loads
        what is used for the first time; `None` with fewer than three, and in the total, which keeps no cycles.
        """
        others = [cycle.verification_seconds for cycle in self.cycles if cycle.is_dense_step][1:]
        return statistics.median(others) if len(others) >= _FEWEST_STEPS else None

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts and measures as plain numbers, and the reasons; what has no data is `None`."""
        counts = ("kernel_size", "num_cycles", "num_short_cycles", "num_dense_steps", "num_lookups", "num_steps",
                  "num_compiled_steps", "num_compiled_verifications", "num_drafted", "num_accepted", "num_rolled_back",
                  "num_nodes_drafted", "num_nodes_verified", "num_reread")  # fmt: skip
        measures = ("acceptance_rate", "aal", "aal_gain", "draft_density", "is_masking", "effective_density")
        return {name: getattr(self, name) for name in (*counts, *measures, "reason", "not_compiled")}

    def seconds(self) -> dict[str, float | None]:
        """Returns what was measured by the host's clock: of drafts, of their verifications, of bringing recurrent
        states to the accepted length, of the choice of neurons, and of a dense step, `None` where none was.
        """
        parts = ("draft", "verification", "state", "selection", "dense_step")
        return {name: getattr(self, f"{name}_seconds") for name in parts}

    def __str__(self) -> str:
        return as_text(summarize(self.as_dict(), self.seconds()))

    def _repr_html_(self) -> str:
        return as_html(summarize(self.as_dict(), self.seconds()))

    def __repr__(self) -> str:
        values = {k: v for k, v in self.as_dict().items() if k not in ("reason", "not_compiled") or v is not None}
        shown = {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in values.items()}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"


class CallHistory:
    """Where the calls of one twin leave their counts: `latest`, whose `total` is that of all."""

    def __init__(self, kernel_size: int | str | tuple[int, ...]):
        self.latest = GenerationStats(kernel_size, total=GenerationStats(kernel_size))

    def new(self) -> GenerationStats:
        """Returns the counts of a further call, which is not the latest one before it runs."""
        return GenerationStats(self.latest.kernel_size, total=self.latest.total)
