"""Times one generation in its parts."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..decode.sparse_twin import SparseTwin
from ..decode.stats import Cycle


def generator(
    model: PreTrainedModel, twin: SparseTwin | None = None, corrected: bool = True
) -> Callable[..., torch.Tensor]:
    """Returns the `generate` of a mode: of the dense model, of its twin corrected by it, or of the twin alone."""
    if twin is None:
        return model.generate
    if not corrected:
        return twin.generate
    return lambda **inputs: model.generate(assistant_model=twin, **inputs)


def synchronize(device: torch.device) -> None:
    """Waits until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclasses.dataclass(frozen=True)
class TimedRun:
    """One greedy generation in its parts."""

    output_ids: torch.LongTensor  # long [1, length], which begins with the prompt
    num_tokens: int  # how many of them are new
    to_first_token: float  # seconds until the first token: of the prefill and what comes before it
    decode: float  # seconds behind the first token
    selection: float  # the part of `decode` that goes to choosing and gathering the neurons
    draft_steps: list[float]  # seconds of each forward of the draft, the mean of its cycle
    verifications: list[float]  # seconds of each verification, or of each step of a dense generation
    cycles: list[Cycle]  # of the twin's statistics; empty for a dense generation
    num_first: int = 1  # new tokens that came at first: of stock assisted decoding with a draft that was kept

    def scaled(self, factor: float) -> "TimedRun":
        """Returns the run with all its times multiplied."""
        times = {name: factor * getattr(self, name) for name in ("to_first_token", "decode", "selection")}
        for name in ("draft_steps", "verifications"):
            times[name] = [factor * seconds for seconds in getattr(self, name)]
        return dataclasses.replace(self, **times)

    @property
    def num_decoded(self) -> int:
        """Tokens behind the first one (or ones)."""
        return self.num_tokens - self.num_first

    @property
    def seconds(self) -> float:
        return self.to_first_token + self.decode

    @property
    def per_token(self) -> dict[str, float]:
        """Seconds per token: of tokens behind the first one `steps` (only drafting and verifying) and `decode`; of all
        tokens `whole`, which all three are where everything came with the first one, of a stock assistant.
        """
        whole = self.seconds / self.num_tokens
        if 1 < self.num_first == self.num_tokens:
            return {"steps": whole, "decode": whole, "whole": whole}
        num_decoded = max(1, self.num_decoded)
        return {
            "steps": (self.decode - self.selection) / num_decoded,
            "decode": self.decode / num_decoded,
            "whole": whole,  # outputs may differ in length below threshold=1.0
        }


class _Clock(BaseStreamer):
    """Notes when tokens arrive, the prompt first."""

    def __init__(self):
        self.times: list[float] = []
        self.sizes: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.sizes.append(value.numel())

    def end(self) -> None:
        pass


def timed_run(model: PreTrainedModel, twin: SparseTwin | None, inputs: Mapping, **options) -> TimedRun:
    """Generates greedily, with the twin or (`None`) the dense model alone, and times the parts.

    Args:
        inputs: of the prompt, with `input_ids`, long [1, prompt_length].
        **options: for `generate`.
    """
    clock, device = _Clock(), inputs["input_ids"].device
    synchronize(device)
    start = time.perf_counter()
    options |= {"do_sample": False, "streamer": clock, "return_dict_in_generate": False}
    output_ids = generator(model, twin)(**inputs, **options)
    synchronize(device)
    end = time.perf_counter()
    _, first_token, *others = clock.times
    cycles = [] if twin is None else twin.stats.cycles
    dense_steps = [after - before for before, after in itertools.pairwise([first_token, *others])]
    return TimedRun(
        output_ids=output_ids,
        num_tokens=output_ids.shape[1] - inputs["input_ids"].shape[1],
        to_first_token=first_token - start,
        decode=end - first_token,
        selection=0.0 if twin is None else twin.stats.selection_seconds,
        draft_steps=[cycle.draft_seconds / cycle.num_steps for cycle in cycles for _ in range(cycle.num_steps)],
        verifications=dense_steps if twin is None else [cycle.verification_seconds for cycle in cycles],
        cycles=cycles,
        num_first=clock.sizes[1],
    )


def agreement_of(runs: Sequence[TimedRun]) -> float:
    """Returns the share of the outputs' tokens that are the dense model's argmax, given the output before them."""
    num_others = sum(cycle.num_accepted - cycle.num_agreed for run in runs for cycle in run.cycles)
    return 1 - num_others / sum(run.num_tokens for run in runs)
