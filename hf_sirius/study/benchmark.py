"""Times dense and corrected generation in alternation, in one process, as medians and ratios."""

import contextlib
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..decode.attach import make_sparse
from ..decode.sparse_twin import SparseTwin
from ..settings.config import SiriusConfig
from ..weights.memory import PeakMemory, StreamedBytes
from ..weights.offload import check_is_empty, offload_to_folder
from .named_models import model_path, own_prompts
from .problems import tokenize
from .rivals import rivals
from .timing import TimedRun, agreement_of, describe_machine, generator, timed_run
from .widening import wide_reasoner


def _alternate(
    model: PreTrainedModel,
    sparse: SparseTwin,
    prompts: list,
    num_repeats: int,
    max_new_tokens: int,
    memory: PeakMemory,
    streamed: StreamedBytes | None = None,
    others: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Times the model's answers, dense, corrected and in other ways in turn; returns medians, and medians of the pairs'
    ratios.
    """
    ways: dict[str, tuple[SparseTwin | None, dict]] = {"dense": (None, {}), "sirius": (sparse, {})}
    ways |= {name: (None, options) for name, options in others.items()}
    runs: dict[str, list[TimedRun]] = {name: [] for name in ways}
    figures: dict[str, list[dict]] = {name: [] for name in ways}
    sparse.stats.reset()
    for prompt in prompts * num_repeats:
        for name, (twin, options) in ways.items():
            memory.restart()
            bytes_before = streamed.num_bytes if streamed else 0
            run = timed_run(model, twin, prompt.to(memory.device), max_new_tokens=max_new_tokens, **options)
            of_run = {
                "num_tokens": run.num_tokens,
                "seconds_to_first_token": run.to_first_token,
                "selection_seconds": run.selection,
                **{f"{part}_seconds_per_token": seconds for part, seconds in run.per_token.items()},
                "seconds": run.seconds,
                "peak_memory_growth": memory.growth(),
            }
            if streamed:
                of_run["bytes_streamed_per_token"] = (streamed.num_bytes - bytes_before) / run.num_tokens
            runs[name].append(run)
            figures[name].append(of_run)

    def median(name: str, key: str) -> float | None:
        values = [of_run[key] for of_run in figures[name]]
        return None if None in values else statistics.median(values)

    def beside_dense(name: str) -> dict[str, Any]:
        pairs = list(zip(runs[name], runs["dense"], strict=True))
        ratios = {
            f"ratio_{part}": statistics.median(run.per_token[part] / dense.per_token[part] for run, dense in pairs)
            for part in ("steps", "decode", "whole")
        }
        is_identical = [torch.equal(run.output_ids, dense.output_ids) for run, dense in pairs]
        return {**ratios, "num_identical": sum(is_identical[: len(prompts)])}

    medians = {name: {key: median(name, key) for key in figures[name][0]} for name in ways}
    return {
        **{name: medians[name] for name in ("dense", "sirius")},
        **beside_dense("sirius"),
        "others": {name: {**medians[name], **beside_dense(name)} for name in others},
        "num_problems": len(prompts),
        "agreement": agreement_of(runs["sirius"]),
        "stats": sparse.stats.total.as_dict(),
    }


def _warm_up(model: PreTrainedModel, prompt: dict, sparse: SparseTwin | None = None) -> PeakMemory:
    """Generates a little, so that lazy loading is not timed; returns a measure of the memory from here on."""
    generator(model, sparse)(**prompt, max_new_tokens=8, do_sample=False)
    return PeakMemory(prompt["input_ids"].device)


def _describe(name: str, model: PreTrainedModel, sparse: SparseTwin, device: torch.device) -> dict[str, Any]:
    num_parameters = sum(p.numel() for p in model.parameters())
    return {
        "machine": describe_machine(str(device)),
        "model": {
            "name": name,
            "num_parameters": num_parameters,
            "num_bytes": num_parameters * model.dtype.itemsize,
            "dtype": str(model.dtype),
        },
        "config": sparse.sirius_config.to_dict(),
    }


def bench_decode(
    config: SiriusConfig | None = None,
    model: str = "reasoner",
    hidden_factor: int | None = None,
    neuron_factor: int | None = None,
    num_problems: int = 3,
    num_repeats: int = 3,
    max_new_tokens: int = 120,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    with_rivals: bool = False,
    **fields: Any,
) -> dict[str, Any]:
    """Times a model, dense and with a twin, in memory.

    Both write every answer in turn, `num_repeats` times. `steps` counts drafting and verifying; `decode` counts all
    from the first token on, and so the gathering of the twin's neurons; `whole` counts the prefill as well.

    Args:
        config, fields: as for `make_sparse`, which without them chooses a draft.
        model: `"reasoner"`, which is widened, with its long problems; `"smollm2"` with its own prompts; or any other id
            or path, with the reasoner's.
        hidden_factor, neuron_factor: how far the reasoner is widened, by default 9 and 16 times; for no other model.
        with_rivals: whether transformers' own ways are timed as well (`study/rivals.py`).

    Returns:
        dict: `machine`, `model`, `config`; `dense` and `sirius` with medians, in seconds and bytes; `ratio_steps`,
        `ratio_decode` and `ratio_whole`, the medians over pairs of sirius / dense; `num_identical` answers of
        `num_problems`; `others`, the same of each rival; `agreement`, the share of tokens that are the dense model's
        argmax; `stats`.
    """
    _check_lengths(max_new_tokens)
    factors = {"hidden_factor": hidden_factor, "neuron_factor": neuron_factor}
    factors = {name: factor for name, factor in factors.items() if factor is not None}
    if model != "reasoner" and factors:
        raise ValueError(f"only the reasoner can be widened, and the model is {model}: leave {', '.join(factors)} out")
    prompts = _tokenized_prompts(model, num_problems)
    if model == "reasoner":
        loaded = wide_reasoner(**{"hidden_factor": 9, "neuron_factor": 16, **factors}, dtype=dtype)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model_path(model), dtype=dtype)
    loaded = loaded.to(device)
    others = rivals(loaded) if with_rivals else {}  # before memory is measured
    memory = _warm_up(loaded, prompts[0].to(device))
    with make_sparse(loaded, config, **fields) as sparse:
        _warm_up(loaded, prompts[0].to(device), sparse)
        for options in others.values():
            loaded.generate(**prompts[0].to(device), max_new_tokens=8, do_sample=False, **options)
        figures = _alternate(loaded, sparse, prompts, num_repeats, max_new_tokens, memory, others=others)
        return {**_describe(model, loaded, sparse, loaded.device), **figures}


def _check_lengths(*lengths: int) -> None:
    if min(lengths) < 2:
        raise ValueError(f"outputs must have at least 2 tokens, behind the first of which is decoding, got {lengths}")


def bench_offload(
    config: SiriusConfig | None = None,
    folder: str | os.PathLike | None = None,
    hidden_factor: int = 9,
    neuron_factor: int = 16,
    num_problems: int = 1,
    num_repeats: int = 3,
    lengths: Sequence[int] = (40, 100, 300),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **fields: Any,
) -> dict[str, Any]:
    """Times the widened reasoner under `accelerate.disk_offload`, dense and with a resident draft.

    Args:
        config, fields: as for `make_sparse`; `draft_memory` bounds what stays resident.
        folder: an empty directory for the weights; by default a temporary one.
        lengths: of the outputs, in tokens; each is measured separately.

    Returns:
        dict as `bench_decode`'s, with the figures of each length under `lengths`. `peak_memory_growth` is by how many
        bytes the process (or the GPU) grew at most beyond those after the imports and a first dense generation;
        `bytes_streamed_per_token` is what accelerate read from the offload folder.

    Raises:
        `OSError` if the disk has no room for the weights, `ValueError` if the folder is not empty.
    """
    _check_lengths(*lengths)
    with contextlib.ExitStack() as cleanup:
        if folder is not None:
            check_is_empty(folder)  # before the model is made
        else:
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="hf_sirius_offload_"))
        prompts = _tokenized_prompts("reasoner", num_problems)
        model = wide_reasoner(hidden_factor, neuron_factor, dtype)
        offload_to_folder(model, folder, device)
        streamed = StreamedBytes(model)
        with make_sparse(model, config, **fields) as sparse:  # which loads bitsandbytes, if need be
            memory = _warm_up(model, prompts[0].to(device))
            _warm_up(model, prompts[0].to(device), sparse)
            description = _describe("reasoner", model, sparse, torch.device(device))
            by_length = {n: _alternate(model, sparse, prompts, num_repeats, n, memory, streamed) for n in lengths}
    return {**description, "lengths": by_length}


def _tokenized_prompts(name: str, num_problems: int) -> list:
    texts = own_prompts(name) or own_prompts("reasoner")
    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    return [tokenize(text, tokenizer, chat) for text, chat in texts[:num_problems]]
