"""Times dense and corrected generation in alternation, in one process, as medians and ratios."""

import contextlib
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedModel

from ..decode.attach import make_sparse
from ..decode.sparse_twin import SparseTwin
from ..decode.stats import kernel_sizes
from ..settings.config import SiriusConfig
from ..weights.memory import PeakMemory, StreamedBytes
from ..weights.offload import check_is_empty, offload_to_folder
from .machine import describe_machine, memory_bandwidth
from .named_models import model_path, own_prompts
from .overhead import step_overhead
from .problems import tokenize
from .reads import bytes_of_forwards
from .rivals import Way, counting, prepared, reads_of, rivals
from .shapes import acceptance, predict
from .timing import TimedRun, agreement_of, generator, timed_run
from .widening import wide_reasoner


def _alternate(
    model: PreTrainedModel,
    ways: Mapping[str, Way],
    prompts: list,
    num_repeats: int,
    max_new_tokens: int,
    memory: PeakMemory,
    streamed: StreamedBytes | None = None,
    read: Mapping[str, float] = MappingProxyType({}),
    is_length_fixed: bool = False,
) -> dict[str, Any]:
    """Times the model's answers in all ways in turn, of which `dense` and `sirius` are two; returns medians, medians of
    the pairs' ratios, and every run.

    Args:
        read: what `bytes_of_forwards` returned, and the `bandwidth`; without it bytes per token are left out.
        is_length_fixed: whether answers go on past EOS.
    """
    lengths = {"max_new_tokens": max_new_tokens} | ({"min_new_tokens": max_new_tokens} if is_length_fixed else {})
    runs: dict[str, list[TimedRun]] = {name: [] for name in ways}
    figures: dict[str, list[dict]] = {name: [] for name in ways}
    sparse = ways["sirius"].twin
    sparse.stats.reset()
    for prompt in prompts * num_repeats:
        for name, way in ways.items():
            memory.restart()
            bytes_before = streamed.num_bytes if streamed else 0
            options = {**way.options, **lengths}
            with counting(model, way) as forwards:
                run = timed_run(model, way.twin, prompt.to(memory.device), **options)
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
            if read:
                of_run |= reads_of(run, way, forwards, read, prompt["input_ids"].shape[1])
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
        "others": {name: {**medians[name], **beside_dense(name)} for name in ways if name not in ("dense", "sirius")},
        "num_problems": len(prompts),
        "agreement": agreement_of(runs["sirius"]),
        "stats": sparse.stats.total.as_dict(),
        "runs": [
            {"way": name, "problem": i % len(prompts), "repeat": i // len(prompts), **of_run, **_chosen(run)}
            for name in ways
            for i, (of_run, run) in enumerate(zip(figures[name], runs[name], strict=True))
        ],
    }


def _chosen(run: TimedRun) -> dict[str, Any]:
    """Returns of a twin's run the tokens of each cycle, as `stats.kernel_sizes` has them, and how many draft steps were
    compiled.
    """
    if not run.cycles:
        return {}
    return {
        "kernel_sizes": kernel_sizes(run.cycles),
        "num_steps": sum(cycle.num_steps for cycle in run.cycles),
        "num_compiled_steps": sum(cycle.num_compiled_steps for cycle in run.cycles),
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
    contexts: Sequence[int] = (),
    shapes: Sequence[str] = (),
    record: Callable[[dict[str, Any]], None] = lambda figures: None,
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
        with_rivals: whether transformers' own ways are timed as well (`study/rivals.py`), and a twin with
            `compile_draft`; and what the package itself takes for a draft step (`study/overhead.py`).
        contexts: lengths in tokens to which prompts are brought by other prompts before them, over and over; each is
            measured separately. By default they are as they are.
        shapes: `"1b"` and `"8b"`: larger models, predicted (`study/shapes.py`).
        record: is given what there is so far, after each part.

    Returns:
        dict: `machine`, `model`, `config`; `bandwidth`, the bytes of memory that are read in a second; `dense` and
        `sirius` with medians, in seconds and bytes; `ratio_steps`, `ratio_decode` and `ratio_whole`, the medians over
        pairs of sirius / dense; `num_identical` answers of `num_problems`; `others`, the same of each rival;
        `left_out`, with reasons; `agreement`, the share of tokens that are the dense model's argmax; `stats`; `runs`,
        the figures of each; `overhead` and `predicted`. What follows the `config` lies by context under `contexts`, if
        these are given.

        Of each way: `aal`, tokens per forward of the full model, those of cycles that the end cut short included;
        `acceptance_rate` of drafted tokens; `bytes_per_token`, weights and KV-cache; `bound_seconds_per_token`, what
        reading them takes.
    """
    _check_lengths(max_new_tokens)
    factors = {"hidden_factor": hidden_factor, "neuron_factor": neuron_factor}
    factors = {name: factor for name, factor in factors.items() if factor is not None}
    if model != "reasoner" and factors:
        raise ValueError(f"only the reasoner can be widened, and the model is {model}: leave {', '.join(factors)} out")
    prompts = [prompt.to(device) for prompt in _tokenized_prompts(model, None)]
    if model == "reasoner":
        loaded = wide_reasoner(**{"hidden_factor": 9, "neuron_factor": 16, **factors}, dtype=dtype)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model_path(model), dtype=dtype)
    most = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if most and contexts and max(contexts) + max_new_tokens > most:
        raise ValueError(
            f"contexts={list(contexts)} and max_new_tokens={max_new_tokens} are more than the {most} tokens that "
            f"{model} takes: shorten them"
        )
    loaded = loaded.to(device)
    bandwidth = memory_bandwidth(loaded.device)
    others = rivals(loaded) if with_rivals else {}  # before memory is measured
    memory = _warm_up(loaded, prompts[0])
    with contextlib.ExitStack() as undo:
        sparse = undo.enter_context(make_sparse(loaded, config, **fields))
        left_out: dict[str, str] = {}
        if with_rivals:
            try:
                compiled = undo.enter_context(make_sparse(loaded, sparse.sirius_config, compile_draft=True))
                others["sirius, compiled"] = Way(twin=compiled, is_compiled=True)
            except ValueError as error:
                left_out["sirius, compiled"] = str(error)
        figures = {**_describe(model, loaded, sparse, loaded.device), "bandwidth": bandwidth, "left_out": left_out}
        for context in sorted(set(contexts)) or (None,):
            of_context = _in_context(prompts, context)[:num_problems]
            read = {"bandwidth": bandwidth, **bytes_of_forwards(loaded, sparse, of_context[0])}
            own = Way(twin=sparse, is_compiled=sparse.sirius_config.compile_draft)
            ways = {"dense": Way(), "sirius": own, **others}
            for name, way in list(ways.items()):
                if way.twin is not None:
                    ways[name] = way = dataclasses.replace(way, draft_bytes=read["draft"])
                try:
                    ways[name] = prepared(loaded, name, way, of_context, max_new_tokens)
                except RuntimeError as error:  # such as of a missing C++ compiler
                    if not way.is_compiled:
                        raise
                    left_out[name] = " ".join(str(error).partition("\n\n")[0].split())
                    del ways[name]
            # Behind a text that is cut out of others, answers may be a single token.
            is_made_up = context is not None
            part = _alternate(
                loaded, ways, of_context, num_repeats, max_new_tokens, memory, read=read, is_length_fixed=is_made_up
            )
            if context is None:
                figures |= part
            else:
                figures.setdefault("contexts", {})[context] = part
            record(figures)
    if with_rivals:
        figures["overhead"] = step_overhead(loaded, prompts[0], num_repeats)
        record(figures)
    if shapes:
        rates = acceptance(loaded, prompts[:num_problems], max_new_tokens)
        figures["predicted"] = {"acceptance_of": model, "shapes": []}
        for shape in shapes:
            predicted = predict(
                shape, rates, bandwidth, prompts[0]["input_ids"].shape[1], max_new_tokens, num_repeats, dtype, device
            )
            figures["predicted"]["shapes"].append(predicted)
            record(figures)
    return figures


def _in_context(prompts: list[BatchEncoding], length: int | None) -> list[BatchEncoding]:
    """Returns the prompts, each with the others before it, over and over, up to a length in tokens."""
    if length is None:
        return prompts
    made = []
    for i, prompt in enumerate(prompts):
        others = [other["input_ids"] for other in (*prompts[i + 1 :], *prompts[:i])] or [prompt["input_ids"]]
        num_times = -(-length // sum(ids.shape[1] for ids in others))
        ids = torch.cat([*others * num_times, prompt["input_ids"]], dim=1)[:, -length:]
        made.append(BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    return made


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
            ways = {"dense": Way(), "sirius": Way(twin=sparse)}
            by_length = {n: _alternate(model, ways, prompts, num_repeats, n, memory, streamed) for n in lengths}
    return {**description, "lengths": by_length}


def _tokenized_prompts(name: str, num_problems: int | None) -> list[BatchEncoding]:
    texts = own_prompts(name) or own_prompts("reasoner")
    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    return [tokenize(text, tokenizer, chat) for text, chat in texts[:num_problems]]
