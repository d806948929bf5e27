"""Chooses a config for a machine by prediction and measurement."""

import contextlib
import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..decode.attach import make_sparse
from ..decode.sparse_twin import SparseTwin
from ..model.accelerate_hooks import execution_device
from ..settings import methods as method_table
from ..settings.config import SiriusConfig
from .prediction import Costs, expected_events, match_rates, survival
from .timing import TimedRun, agreement_of, timed_run
from .tuning_result import Candidate, Measurement, Tuning, draft_name


METHODS = tuple(name for name, row in method_table.METHODS.items() if row.saves_time)
DENSITIES = (1.0, 0.5)
DRAFT_DTYPES = (None, "int8", "int4")
KERNEL_SIZES = (4, 8, 16, 24, 32)
THRESHOLDS = (0.1, 0.3, 0.5, 0.9)
_DEFAULTS = SiriusConfig()
# The prediction takes a cycle to be kernel_size - 1 single drafted tokens and one verification. With these it is not.
_NOT_PREDICTED = ("draft_confidence", "reselect_every", "tree_width")
_DENSE, _SIZED = "dense", "sized"
_NUM_PACE_STEPS = 10


class Setting(NamedTuple):
    """What a draft is, and how it is verified."""

    method: str
    density: float
    draft_dtype: str | None
    threshold: float

    def __str__(self) -> str:
        return f"{draft_name(*self[:-1])}, threshold {self.threshold}"


def _measure(
    model: PreTrainedModel,
    config: SiriusConfig,
    prompts: Sequence[Mapping],
    num_repeats: int,
    max_new_tokens: int,
    progress: tqdm,
) -> Measurement:
    decode, whole, runs = [], [], []
    with make_sparse(model, config) as twin:
        for _ in range(num_repeats):
            for inputs in prompts:
                dense = timed_run(model, None, inputs, max_new_tokens=max_new_tokens)
                sirius = timed_run(model, twin, inputs, max_new_tokens=max_new_tokens)
                runs.append(sirius)
                decode.append(sirius.per_token["decode"] / dense.per_token["decode"])
                whole.append(sirius.per_token["whole"] / dense.per_token["whole"])
                progress.update()
    return Measurement(tuple(decode), tuple(whole), agreement=agreement_of(runs))


def _checked_prompts(prompts: Sequence[Mapping], device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Returns the prompts on a device; raises `ValueError` or `TypeError` for what is no prompt."""
    prompts = list(prompts)
    if not prompts:
        raise ValueError("tune needs at least one prompt to write outputs for, got none")
    for inputs in prompts:
        if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), torch.Tensor):
            raise TypeError(
                "each prompt must be what tokenizer(text, return_tensors='pt') returns, with input_ids, got "
                f"{type(inputs).__name__}"
            )
        shape = tuple(inputs["input_ids"].shape)
        if len(shape) != 2 or shape[0] != 1 or not shape[1]:
            raise ValueError(f"each prompt must be one sequence, input_ids [1, prompt_length], got {list(shape)}")
        if "attention_mask" in inputs and not inputs["attention_mask"].all():
            raise ValueError("a prompt is padded: tokenize each by itself")
    return [{name: value.to(device) for name, value in inputs.items()} for inputs in prompts]


def candidate_grid(
    config: SiriusConfig | None = None,
    methods: Sequence[str] = METHODS,
    densities: Sequence[float] = DENSITIES,
    kernel_sizes: Sequence[int] = KERNEL_SIZES,
    agreement: float | None = None,
    thresholds: Sequence[float] | None = None,
    draft_dtypes: Sequence[str | None] | None = None,
) -> list[list[SiriusConfig]]:
    """Returns the candidates of [`tune`] by method, density, dtype and threshold, each by kernel size.

    The arguments are as for [`tune`]. Making the candidates needs no model, so that a wrong value is refused, by a
    `ValueError`, before one is loaded.
    """
    config = config or _DEFAULTS
    for name in _NOT_PREDICTED:
        if getattr(config, name) != getattr(_DEFAULTS, name):
            raise ValueError(
                f"tune predicts drafts of kernel_size - 1 tokens, chosen for once: leave {name} out of its config"
            )
    if agreement is not None and not 0 < agreement < 1:
        raise ValueError(
            f"agreement must be in (0, 1), a share of the tokens, got {agreement}; without one all have to agree"
        )
    if thresholds is None:
        thresholds = () if agreement is None else THRESHOLDS
    elif agreement is None:
        raise ValueError(
            "thresholds below 1.0 are candidates where not all tokens have to agree: pass an agreement, such as 0.98, "
            "or leave thresholds out"
        )
    if draft_dtypes is None:
        draft_dtypes = DRAFT_DTYPES if config.draft_dtype is None else (config.draft_dtype,)
    # At a density of 1 all methods are one, and without a dtype of its own the draft would be the model.
    drafts = dict.fromkeys(
        (method if density < 1 else methods[0], density, dtype)
        for method, density, dtype in itertools.product(methods, densities, draft_dtypes)
        if density < 1 or dtype is not None or len(draft_dtypes) == 1
    )
    grid = [
        [_candidate(config, *draft, threshold, kernel_size) for kernel_size in sorted(set(kernel_sizes))]
        for draft in drafts
        for threshold in sorted({1.0, *thresholds})
    ]
    if not any(grid):
        raise ValueError("methods, densities, kernel_sizes and draft_dtypes must each name one candidate at least")
    return grid


def _candidate(config: SiriusConfig, method, density, draft_dtype, threshold, kernel_size) -> SiriusConfig:
    scope = {} if draft_dtype is not None else {"draft_scope": _DEFAULTS.draft_scope}
    return config.with_method(
        method, density=density, draft_dtype=draft_dtype, threshold=threshold, kernel_size=kernel_size, **scope
    )


def _key(config: SiriusConfig) -> Setting:
    return Setting(config.method, config.density, config.draft_dtype, config.threshold)


def _costs(dense_runs: list[TimedRun], runs: dict[Setting, list[TimedRun]], sized_runs: list[TimedRun]) -> Costs:
    dense_step = statistics.median(itertools.chain(*(run.verifications for run in dense_runs)))
    verifications, draft_steps, selections = (defaultdict(list) for _ in range(3))
    for run in itertools.chain(*runs.values(), sized_runs):
        for cycle, seconds in zip(run.cycles, run.verifications, strict=True):
            verifications[len(cycle.drafted_ids) + 1].append(seconds)
    for (*draft, _), of_setting in runs.items():
        for run in of_setting:
            draft_steps[tuple(draft)] += run.draft_steps
            selections[tuple(draft)].append(run.selection)

    def medians(times: dict[Any, list[float]]) -> dict[Any, float]:
        # Without a time, no output was long enough for a draft, and the prediction counts none.
        return {key: statistics.median(values or [dense_step]) for key, values in times.items()}

    return Costs(dense_step, dict(sorted(medians(verifications).items())), medians(draft_steps), medians(selections))


def _predict(
    config: SiriusConfig, costs: Costs, dense_runs: list[TimedRun], runs: list[TimedRun], max_new_tokens: int
) -> Candidate:
    """Predicts the time of a setting from runs with another kernel size."""
    decode, whole = [], []
    num_decoded = num_cycles = 0
    for dense, run in zip(dense_runs, runs, strict=True):
        num_steps, verifications = expected_events(match_rates(run.cycles), config.kernel_size, max_new_tokens - 1)
        seconds = costs.decode_seconds(config, num_steps, verifications)
        decode.append(seconds / run.num_decoded / costs.dense_step)
        dense_seconds = dense.to_first_token + dense.num_decoded * costs.dense_step
        per_token = (run.to_first_token + seconds) / (run.num_decoded + 1)
        whole.append(per_token / (dense_seconds / (dense.num_decoded + 1)))
        num_decoded += run.num_decoded
        num_cycles += sum(verifications.values())
    advance_length = num_decoded / num_cycles
    return Candidate(config, advance_length, statistics.median(decode), statistics.median(whole), agreement_of(runs))


def tune(
    model: PreTrainedModel,
    prompts: Sequence[Mapping],
    config: SiriusConfig | None = None,
    *,
    methods: Sequence[str] = METHODS,
    densities: Sequence[float] = DENSITIES,
    kernel_sizes: Sequence[int] = KERNEL_SIZES,
    agreement: float | None = None,
    thresholds: Sequence[float] | None = None,
    draft_dtypes: Sequence[str | None] | None = None,
    max_new_tokens: int = 100,
    num_measured: int = 1,
    num_repeats: int = 2,
    show_progress: bool = False,
) -> Tuning:
    """Finds the config with the least time per token for this model, these prompts and this machine.

    Each method, density, dtype and threshold writes every prompt's output once, with the largest kernel size: that
    gives the time of a draft step, and the tokens that are accepted. Short outputs with each other kernel size give the
    time of a verification. The time of every combination is predicted from these, and the best are measured in
    alternation with the dense model.

    Args:
        prompts: what the tokenizer makes of each, with `input_ids`, long [1, prompt_length].
        config: what does not vary; each method takes the fields that it knows.
        methods: every combination of these, the densities and the kernel sizes is a candidate; by default those that
            save time.
        densities: go with every method. At a density of 1 nothing is dropped, whatever the method.
        kernel_sizes: go with every method and density.
        agreement: in (0, 1), the least share of the outputs' tokens that must be the dense model's argmax, given the
            output before them. By default `threshold` is 1.0, so that all are.
        thresholds: candidates beside 1.0 where an agreement is given, [`THRESHOLDS`] by default.
        draft_dtypes: go with every combination; by default that of the config, or if it has none [`DRAFT_DTYPES`].
        max_new_tokens: of the outputs, which are greedy; at least 2.
        num_measured: how many candidates are measured, those with the best prediction first; at least 1.
        num_repeats: how often each output is measured, at least 1.

    Raises:
        TypeError: for prompts that are not tokenized.
        ValueError: for a value that is not allowed, a config with `draft_confidence`, `tree_width` or `reselect_every`,
            outputs that all end with their first token, or if no candidate works with the model. `left_out` names
            those that do not.
    """
    prompts = _checked_prompts(prompts, execution_device(model))
    minima = {"max_new_tokens": (max_new_tokens, 2), "num_measured": (num_measured, 1), "num_repeats": (num_repeats, 1)}
    for name, (value, minimum) in minima.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")
    grid = candidate_grid(config, methods, densities, kernel_sizes, agreement, thresholds, draft_dtypes)
    with tqdm(disable=not show_progress, unit="run", desc="tune") as progress:
        dense_runs, runs, sized_runs, left_out = _run_all(model, prompts, grid, max_new_tokens, progress)
        writes = [dense.num_decoded > 0 for dense in dense_runs]
        if not any(writes):
            raise ValueError("every output ends with its first token, behind which there is nothing to speed up")
        prompts, dense_runs = (list(itertools.compress(values, writes)) for values in (prompts, dense_runs))
        runs = {key: list(itertools.compress(of_key, writes)) for key, of_key in runs.items()}
        costs = _costs(dense_runs, runs, sized_runs)
        candidates = []
        for configs in grid:
            if (key := _key(configs[0])) not in runs:
                continue
            agreed = agreement_of(runs[key])
            if agreement is not None and agreed < agreement:
                left_out[str(key)] = f"only {agreed:.3f} of the tokens agree"
                continue
            candidates += [_predict(config, costs, dense_runs, runs[key], max_new_tokens) for config in configs]
        candidates.sort(key=lambda candidate: candidate.predicted_decode)
        measured: list[Candidate] = []
        while candidates and len(measured) < num_measured:
            num_left = min(num_measured - len(measured), len(candidates))
            progress.total = progress.n + len(prompts) * num_repeats * num_left
            candidate = candidates.pop(0)
            measurement = _measure(model, candidate.config, prompts, num_repeats, max_new_tokens, progress)
            # With another kernel size, the model's own tokens are at other places, so the agreement is another one.
            if agreement is None or measurement.agreement >= agreement:
                measured.append(dataclasses.replace(candidate, measured=measurement))
            else:
                name = f"{_key(candidate.config)}, kernel_size {candidate.config.kernel_size}"
                left_out[name] = f"only {measurement.agreement:.3f} of the measured outputs' tokens agree"
    return Tuning(
        best=min(measured, key=lambda candidate: candidate.measured.ratio_decode),
        candidates=(*measured, *candidates),
        costs=costs,
        survivals={key: survival([cycle for run in of_key for cycle in run.cycles]) for key, of_key in runs.items()},
        left_out=left_out,
    )


def _run_all(
    model: PreTrainedModel, prompts: list[Mapping], grid: list[list[SiriusConfig]], max_new_tokens: int, progress: tqdm
) -> tuple[list[TimedRun], dict[Setting, list[TimedRun]], list[TimedRun], dict[str, str]]:
    """Returns dense runs, those of each setting with its last kernel size, short ones with the other kernel sizes, and
    the settings that do not work, with the reason.

    Each run stands between two short dense ones, which tell how fast the machine is: where other work slows it down,
    the times are scaled to its usual pace.
    """
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as cleanup:
        timed_run(model, None, prompts[0], max_new_tokens=8)  # so that lazy loading is not timed
        twins: dict[Setting, SparseTwin] = {}
        for config in (configs[-1] for configs in grid):
            try:
                twin = cleanup.enter_context(make_sparse(model, config))
                timed_run(model, twin, prompts[0], max_new_tokens=8)
                twins[_key(config)] = twin
            except (ValueError, ImportError) as error:
                left_out[str(_key(config))] = str(error)
        if not twins:
            raise ValueError(f"no candidate works with this {type(model).__name__}: {next(iter(left_out.values()))}")
        # What a verification takes does not depend on the draft.
        others = next(configs[:-1] for configs in grid if _key(configs[-1]) in twins)
        sized_twins = [cleanup.enter_context(make_sparse(model, config)) for config in others]

        progress.total = len(prompts) * (1 + len(twins) + len(sized_twins))
        timeline: list[tuple[Any, TimedRun]] = []  # in turn, so that other work of the machine slows all alike
        paces = [_pace(model, prompts[0])]
        for inputs in prompts:
            for key, twin in [(_DENSE, None), *twins.items(), *((_SIZED, twin) for twin in sized_twins)]:
                lengths = {"max_new_tokens": max_new_tokens}
                if key == _SIZED:  # two full cycles, as far as they occur
                    length = min(2 * twin.sirius_config.kernel_size + 1, max_new_tokens)
                    lengths = {"max_new_tokens": length, "min_new_tokens": length}
                timeline.append((key, timed_run(model, twin, inputs, **lengths)))
                paces.append(_pace(model, inputs))
                progress.update()
    usual = statistics.median(paces)
    runs: dict[Any, list[TimedRun]] = {key: [] for key in (_DENSE, *twins, _SIZED)}
    for (key, run), *around in zip(timeline, paces[:-1], paces[1:], strict=True):
        runs[key].append(run.scaled(usual / statistics.fmean(around)))
    return runs.pop(_DENSE), runs, runs.pop(_SIZED), left_out


def _pace(model: PreTrainedModel, inputs: Mapping) -> float:
    """Returns the median seconds of a few dense steps: how fast the machine is just now."""
    length = _NUM_PACE_STEPS + 1
    run = timed_run(model, None, inputs, max_new_tokens=length, min_new_tokens=length)
    return statistics.median(run.verifications)
