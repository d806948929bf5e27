"""Running a task in several modes (dense, sparse alone, corrected), item by item, over one process or many."""

import contextlib
import csv
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import os
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedModel

from .. import __version__
from ..decode.attach import make_sparse, repeatable
from ..decode.sparse_twin import SparseTwin
from ..model.accelerate_hooks import execution_device
from ..model.adapters import adapters_in_use
from ..settings.config import SiriusConfig
from .tasks import Task, digest


_FORMAT = 3  # of the records and of what run.json tells: a run with another one is refused
_NUM_TOLD = 4  # settings, at most, in which one run differs from another


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to run a model. The files of a run call it a way."""

    name: str  # for people
    config: SiriusConfig | None = None  # of the twin; `None` runs the dense model
    corrected: bool = True  # whether the model corrects its twin, which else runs alone

    def description(self) -> dict[str, Any]:
        """Returns all that its records depend on, as plain values."""
        calibration = None
        if self.config is not None and self.config.calibration is not None:
            thresholds = str(self.config.calibration.thresholds(self.config.density, self.config.budget))
            calibration = hashlib.sha256(thresholds.encode()).hexdigest()[:16]
        config = None if self.config is None else self.config.to_dict()
        return {"config": config, "calibration": calibration, "alone": not self.corrected}

    @property
    def key(self) -> str:
        return digest(self.description())


def standard_modes(config: SiriusConfig) -> list[Mode]:
    """Returns the dense model, the twin alone, and the two together."""
    config = repeatable(config)
    return [Mode("dense"), Mode("sparse alone", config, corrected=False), Mode("Sirius", config)]


def run_task(
    model: PreTrainedModel,
    task: Task,
    modes: Iterable[Mode],
    directory: str | os.PathLike,
    model_name: str,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Runs every item of a task in every mode, in alternation, and writes `results.json` and `results.csv`.

    Each record is on the disk before the next item begins. The same call on the same directory goes on where an earlier
    one was interrupted, and ends with the same figures. `accelerate launch` splits the items over its processes, whose
    records are gathered at the end.

    Args:
        model: the dense model; twins of it are made as they are needed.
        modes: in the order of the table.
        directory: of this run, made if need be.
        model_name: what the results call the model.
        show_progress: whether a bar is shown (by the first process).

    Returns:
        dict: `model`, `task`, and `rows`, one for each mode, with the measures by name.

    Raises:
        `ValueError` if the directory holds another run, or a record that cannot be read, or if another process is at
        work in it.
    """
    modes = list(modes)
    for mode in modes:
        task.check(model, mode.config, mode.corrected)
    state = process_state()
    description = describe_run(model, model_name, task)
    with _locked(Path(directory), state):
        records = _Records(Path(directory), description, state)
        _run_missing(model, task, modes, records, state, show_progress)
        gathered = dict(itertools.chain.from_iterable(done.items() for done in gather_object([records.done])))
        rows = []
        for mode in modes:
            measures = task.measures([gathered[mode.key, idx] for idx in range(len(task))])
            rows.append({"way": mode.name, **mode.description(), "num_items": len(task), **measures})
        results = {**description, "rows": rows}
        if state.is_main_process:
            _write_results(Path(directory), results)
        state.wait_for_everyone()
    return results


@contextlib.contextmanager
def _locked(directory: Path, state: PartialState) -> Iterator[None]:
    """Keeps other runs out of a directory, which is made if need be. Of the processes of a run the first holds a lock
    for all. It is the operating system's, so that it ends with the process, and a file that stays behind bars nobody.

    Raises:
        `ValueError`, in every process, if another run holds the lock.
    """
    if directory.is_file():
        raise ValueError(f"the directory of a run cannot be {str(directory)!r}, which is a file: name another one")
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup:
        is_free = [True]
        if state.is_main_process:
            try:
                cleanup.enter_context(FileLock(directory / "run.lock", timeout=0))
            except Timeout:
                is_free = [False]
        if not broadcast_object_list(is_free)[0]:
            raise ValueError(
                f"another process is at work in {str(directory)!r}: wait for its end, or name another directory "
                "(--output_dir)"
            )
        yield


def _run_missing(
    model: PreTrainedModel, task: Task, modes: list[Mode], records: "_Records", state: PartialState, show_progress: bool
) -> None:
    """Runs this process's share of the items that are not recorded. It runs all modes of an item, in alternation."""
    missing = [i for i in range(len(task)) if any((mode.key, i) not in records.done for mode in modes)]
    mine = missing[state.process_index :: state.num_processes]
    todo = [(idx, mode) for idx in mine for mode in modes if (mode.key, idx) not in records.done]
    total, is_shown = len(mine) * len(modes), show_progress and state.is_main_process
    with (
        contextlib.ExitStack() as cleanup,
        tqdm(
            desc=f"{task.name}, each in {len(modes)} ways",
            unit="item",
            total=total,
            initial=total - len(todo),
            disable=not is_shown,
        ) as progress,
    ):
        twins: dict[str, SparseTwin | None] = {}
        for idx, mode in todo:
            if mode.key not in twins:
                is_dense = mode.config is None
                twins[mode.key] = None if is_dense else cleanup.enter_context(make_sparse(model, mode.config))
                task.warm_up(model, twins[mode.key], mode.corrected)
            record = task.run(idx, model, twins[mode.key], mode.corrected)
            records.append({"way": mode.key, "item": idx, **record})
            progress.update()


class _Records:
    """The records of a run in a directory: `run.json` describes the run, `records-*.jsonl` have a line for each record.

    Attributes:
        done: what is recorded, by mode and item: by all processes before this one began, and by this one since.
    """

    def __init__(self, directory: Path, description: dict[str, Any], state: PartialState):
        run_file = directory / "run.json"
        if run_file.exists():
            _check_same(directory, json.loads(run_file.read_text(encoding="utf-8")), description)
        elif any(directory.glob("records-*.jsonl")):
            raise ValueError(
                f"{str(directory)!r} holds records without the run.json that tells of which run they are: name another "
                "directory, or remove this one"
            )
        state.wait_for_everyone()
        if state.is_main_process and not run_file.exists():
            _write(run_file, json.dumps(description, indent=2) + "\n")
        files = sorted(directory.glob("records-*.jsonl"))
        records = itertools.chain.from_iterable(_read_records(file, state) for file in files)
        self.done = {(record["way"], record["item"]): record for record in records}
        state.wait_for_everyone()  # before anybody writes
        self._file = directory / f"records-{state.process_index}.jsonl"

    def append(self, record: dict) -> None:
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[record["way"], record["item"]] = record


def _check_same(directory: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises `ValueError` unless the run that a directory holds is this one."""
    remedy = "name another directory (--output_dir), or remove this one"
    if there.get("format") != _FORMAT:
        raise ValueError(
            f"{str(directory)!r} holds another run, of a version of hf_sirius that did not write down all that answers "
            f"depend on (format {there.get('format')}, and this is {_FORMAT}): {remedy}"
        )
    there, here = dict(_flat(there)), dict(_flat(here))
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    if names:
        told = [f"{name}: {reprlib.repr(there.get(name))} there, {reprlib.repr(here.get(name))} here" for name in names]
        told[_NUM_TOLD:] = [f"and {len(names) - _NUM_TOLD} more"] if len(names) > _NUM_TOLD else []
        raise ValueError(f"{str(directory)!r} holds another run ({'; '.join(told)}): {remedy}")


def _flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all settings by names such as `generation.eos_token_id`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def _read_records(file: Path, state: PartialState) -> Iterator[dict]:
    """Yields the records of a file. A last one that was cut short is taken off the file."""
    whole, _, cut = file.read_bytes().rpartition(b"\n")
    if cut and state.is_main_process:
        os.truncate(file, len(whole) + bool(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not valid JSON ({error}): remove the line") from error


def _write(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8", newline="")
    part.replace(file)


def _write_results(directory: Path, results: dict[str, Any]) -> None:
    _write(directory / "results.json", json.dumps(results, indent=2) + "\n")
    settings = [field.name for field in dataclasses.fields(SiriusConfig) if field.name != "calibration"]
    names = [name for name in results["rows"][-1] if name not in ("config", "calibration", "way")]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["way", *settings, *names], extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**(row["config"] or {}), **row} for row in results["rows"])
    _write(directory / "results.csv", table.getvalue())


def process_state() -> PartialState:
    """Returns the state of accelerate's processes, which wait for each other as long as an item may take."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(days=30))


def _fingerprint(model: PreTrainedModel) -> str:
    """Returns a digest of the weights: of all names, shapes and dtypes, and of all values of each tensor, or of tens of
    thousands, evenly spaced, of a large one. Of weights that accelerate offloads no values are read.
    """
    seen = hashlib.sha256()
    waiting = list(model.state_dict().items())
    while waiting:
        name, tensor = waiting.pop()
        if hasattr(tensor, "__tensor_flatten__"):  # packed by a library
            waiting += [(f"{name}.{part}", getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0]]
        elif isinstance(tensor, torch.Tensor):
            seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if not tensor.is_meta:
                # An odd step, which does not stay in a few columns.
                values = tensor.detach().reshape(-1)[:: tensor.numel() // 2**16 | 1]
                seen.update(values.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return seen.hexdigest()[:16]


def describe_run(model: PreTrainedModel, model_name: str, task: Task) -> dict[str, Any]:
    """Returns all that the records of a run depend on, except its modes, as plain values."""
    config = json.loads(model.config.to_json_string())
    for name in ("dtype", "transformers_version"):  # told below, as they are now
        config.pop(name, None)
    return {
        "model": model_name,
        "dtype": str(model.dtype),
        "weights": _fingerprint(model),
        "adapters": adapters_in_use(model),
        "device": execution_device(model).type,
        "attention": model.config._attn_implementation,
        "hf_sirius": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "format": _FORMAT,
        **task.description(model),
        "model_config": config,
    }


def default_directory(description: dict[str, Any], modes: Iterable[Mode]) -> Path:
    """Returns a directory of its own for each run and its modes, so that the same command goes on with a run."""
    stem = "-".join(Path(description[name]).name for name in ("model", "task"))
    return Path("runs") / f"{stem}-{digest([description, [mode.key for mode in modes]])[:8]}"
