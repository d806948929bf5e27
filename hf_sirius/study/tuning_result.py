"""The result of tuning: the candidates, predicted and measured, and the verdict."""

import dataclasses
import statistics
from typing import Any

from ..settings.config import SiriusConfig
from .prediction import Costs


def draft_name(method: str, density: float, draft_dtype: str | None) -> str:
    """Returns what a draft is, in words."""
    kept = f"{method} {density}" if density < 1 else "whole"
    return kept if draft_dtype is None else f"{kept} {draft_dtype}"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Dense and corrected generations in alternation."""

    # for each pair of generations, Sirius' seconds per token / the dense ones: behind the first token, and of
    # all tokens
    decode: tuple[float, ...]
    whole: tuple[float, ...]
    agreement: float  # of these outputs, as in [`Candidate`]

    @property
    def ratio_decode(self) -> float:
        return statistics.median(self.decode)

    @property
    def ratio_whole(self) -> float:
        return statistics.median(self.whole)

    @property
    def num_faster(self) -> int:
        """The number of pairs in which Sirius was faster by both ratios."""
        return sum(max(pair) < 1 for pair in zip(self.decode, self.whole, strict=True))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting."""

    config: SiriusConfig  # of the twin
    advance_length: float  # the tokens per cycle that are predicted, including cycles that are cut short
    predicted_decode: float  # Sirius' seconds per token / the dense ones; the median over the prompts
    predicted_whole: float
    # the share of the output's tokens that are the dense model's argmax, given the output before them
    agreement: float = 1.0
    measured: Measurement | None = None  # `None` if it was only predicted

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it as plain values."""
        values = {**vars(self), "config": self.config.to_dict(), "measured": None}
        if self.measured is not None:
            ratios = {"ratio_decode": self.measured.ratio_decode, "ratio_whole": self.measured.ratio_whole}
            values["measured"] = {**ratios, **dataclasses.asdict(self.measured)}
        return values


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The result of [`tune`].

    Attributes:
        best: the measured candidate with the least time per token behind the first one.
        candidates: the measured ones, then all others that were allowed, each with the best prediction first.
        costs: what the predictions follow from.
        survivals: how far drafts were accepted, as in [`survival`], by method, density, dtype and threshold.
        left_out: settings that were not candidates, and why.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    costs: Costs
    survivals: dict[tuple[str, float, str | None, float], list[float]]
    left_out: dict[str, str]

    @property
    def config(self) -> SiriusConfig:
        return self.best.config

    @property
    def predicted_ratio(self) -> float:
        """The predicted time per token behind the first one (*decode*), Sirius / dense."""
        return self.best.predicted_decode

    @property
    def measured_ratio(self) -> float:
        """The measured one, the median over pairs of generations."""
        return self.best.measured.ratio_decode

    @property
    def helps(self) -> bool:
        """Whether Sirius is faster in at least three of four pairs of generations, prefill included: beyond noise."""
        return self.best.measured.num_faster >= 0.75 * len(self.best.measured.decode)

    @property
    def verdict(self) -> str:
        """Says whether Sirius helps, and why."""
        config, costs, measured = self.config, self.costs, self.best.measured
        setting = f"{draft_name(config.method, config.density, config.draft_dtype)}, kernel_size {config.kernel_size}"
        setting += f", threshold {config.threshold}"
        takes = (
            f"takes {measured.ratio_decode:.2f} of the dense time per token ({measured.ratio_whole:.2f} with the "
            f"prefill), faster in {measured.num_faster} of {len(measured.decode)} pairs of generations"
        )
        draft = costs.draft_steps[config.method, config.density, config.draft_dtype] / costs.dense_step
        verification = costs.verification(config.kernel_size) / costs.dense_step
        why = (
            f"A draft step costs {draft:.2f} of a dense step, a verification of {config.kernel_size} tokens "
            f"{verification:.2f} dense steps, and a cycle gains {self.best.advance_length:.1f} tokens."
        )
        if self.helps:
            return f"Sirius helps on this machine: {setting}, {takes}. {why}"
        if max(measured.ratio_decode, measured.ratio_whole) < 1:
            takes += ", which is within noise (it would have to be faster in three of four)"
        return f"Sirius does not help on this machine: the best setting ({setting}) {takes}. {why}"

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it as plain values."""
        costs = dataclasses.asdict(self.costs)
        for name in ("draft_steps", "selections"):
            costs[name] = {" ".join(map(str, key)): value for key, value in costs[name].items()}
        return {
            "config": self.config.to_dict(),
            "predicted_ratio": self.predicted_ratio,
            "measured_ratio": self.measured_ratio,
            "helps": self.helps,
            "verdict": self.verdict,
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            "costs": costs,
            "survivals": {" ".join(map(str, key)): shares for key, shares in self.survivals.items()},
            "left_out": self.left_out,
        }
