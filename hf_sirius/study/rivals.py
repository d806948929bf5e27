"""The ways to write a model's text: what transformers itself offers to write it sooner, to be timed beside a twin."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BatchEncoding, CompileConfig, PreTrainedModel

from ..decode.sparse_twin import SparseTwin
from ..model.projections import is_projection
from ..weights.formats import changes, draft_linear, head_dtype, num_bytes
from .timing import TimedRun, generator


_NUM_FIRST, _NUM_COMPILING = 8, 24  # tokens that are written before anything is timed


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to write a text.

    Attributes:
        options: of `generate`, beside the twin.
        twin: what drafts, if it is one of ours.
        draft_bytes: of the projections that a forward of what drafts reads; 0 where nothing has forwards of its own.
        is_compiled: whether its first use compiles.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    twin: SparseTwin | None = None
    draft_bytes: float = 0.0
    is_compiled: bool = False


def rivals(model: PreTrainedModel) -> dict[str, Way]:
    """Returns transformers' own ways by name, each as its users would have it: with transformers' own defaults."""
    compiled = CompileConfig()
    compiled._compile_all_devices = True  # else it is for GPUs alone
    return {
        "dense, compiled": Way({"cache_implementation": "static", "compile_config": compiled}, is_compiled=True),
        "int4 copy as assistant": Way({"assistant_model": int4_copy(model)}, draft_bytes=_copy_bytes(model)),
        "prompt lookup": Way({"prompt_lookup_num_tokens": 10}),
    }


def _copy_dtype(model: PreTrainedModel, module: nn.Module) -> str | None:
    """Returns in what a copy in 4 bits has a projection: the head maybe in 8, and what has them already as it is."""
    if not changes(module, "int4"):
        return None
    return head_dtype("int4", module.weight.device) if module is model.get_output_embeddings() else "int4"


def _copy_bytes(model: PreTrainedModel) -> int:
    found = dict.fromkeys(module for module in model.modules() if is_projection(module))
    return sum(num_bytes(module, _copy_dtype(model, module)) for module in found)


@torch.no_grad()
def int4_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy whose projections have 4 bits (the head maybe 8), by the products that drafts have as well."""
    assistant = copy.deepcopy(model)
    for owner in list(assistant.modules()):
        for name, child in list(owner.named_children()):
            if is_projection(child) and (draft_dtype := _copy_dtype(assistant, child)) is not None:
                setattr(owner, name, draft_linear(child, draft_dtype, compute_dtype=model.dtype))
    return assistant


@dataclasses.dataclass
class Forwards:
    """Forwards of one generation, of a model and of what drafts for it."""

    num_read: list[int] = dataclasses.field(default_factory=list)  # tokens that each of the model's read
    num_steps: int = 0  # of what drafts

    def num_drafted(self, prompt_length: int) -> int:
        """Returns how many drafted tokens the model read; the others are the prompt's, and its own."""
        return sum(self.num_read) - prompt_length - (len(self.num_read) - 1)


@contextlib.contextmanager
def counting(model: PreTrainedModel, way: Way) -> Iterator[Forwards | None]:
    """Within the block, forwards are counted where transformers drafts, of which a twin's cycles do not tell."""
    if not way.options or way.is_compiled:
        yield None
        return
    forwards = Forwards()

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        forwards.num_read.append((args[0] if args else kwargs["input_ids"]).shape[-1])

    def note_step(module: nn.Module, args: tuple) -> None:
        forwards.num_steps += 1

    with contextlib.ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(note, with_kwargs=True).remove)
        if (assistant := way.options.get("assistant_model")) is not None:
            undo.callback(assistant.register_forward_pre_hook(note_step).remove)
        yield forwards


def prepared(model: PreTrainedModel, name: str, way: Way, prompts: Sequence[BatchEncoding], max_new_tokens: int) -> Way:
    """Returns a way of which nothing is used for the first time any more; a static KV-cache has room for the longest of
    the prompts, so that nothing is compiled for each.
    """
    prompt = max(prompts, key=lambda prompt: prompt["input_ids"].shape[1])
    if "cache_implementation" in way.options:
        room = prompt["input_ids"].shape[1] + max_new_tokens
        way = dataclasses.replace(way, options={**way.options, "max_cache_len": room})
    num_tokens = _NUM_COMPILING if way.is_compiled else _NUM_FIRST
    # No fewer, as a draft comes behind a few tokens.
    options = {**way.options, "do_sample": False, "max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    bar = {"total": 1, "desc": f"{name}: compiling, which may take minutes", "bar_format": "{desc}: {elapsed}"}
    with tqdm(**bar, disable=not way.is_compiled) as progress:
        generator(model, way.twin)(**prompt, **options)
        progress.update()
    return way


def reads_of(
    run: TimedRun, way: Way, forwards: Forwards | None, read: Mapping[str, float], prompt_length: int
) -> dict[str, float | None]:
    """Returns of a generation `aal`, the tokens per forward of the full model, those of cycles that the end cut short
    included; the `acceptance_rate` of drafted tokens; and what is read for a token, weights and KV-cache.

    Args:
        forwards: what [`counting`] yielded.
        read: what `bytes_of_forwards` returned, and the `bandwidth`.
    """
    num_written = run.num_tokens - 1  # behind the first forward, of the prompt, which wrote one
    if way.twin is not None:
        num_full, num_steps = len(run.cycles), sum(cycle.num_steps for cycle in run.cycles)
        num_drafted = sum(len(cycle.drafted_ids) for cycle in run.cycles)
    elif forwards is not None:
        is_drafted = forwards.num_read[0] > prompt_length  # so that the first forward is as others are
        num_full, num_steps = len(forwards.num_read) - 1 + is_drafted, forwards.num_steps
        num_drafted, num_written = forwards.num_drafted(prompt_length), num_written + is_drafted
    else:
        num_full, num_steps, num_drafted = num_written, 0, 0
    cache = read["cache"] * (prompt_length + run.num_tokens / 2)
    num_bytes = num_full * (read["model"] + cache) + num_steps * (way.draft_bytes + cache)
    return {
        "aal": num_written / num_full if num_full else None,
        "acceptance_rate": (num_written - num_full) / num_drafted if num_drafted else None,
        "bytes_per_token": num_bytes / max(1, num_written),
        "bound_seconds_per_token": num_bytes / max(1, num_written) / read["bandwidth"],
    }
