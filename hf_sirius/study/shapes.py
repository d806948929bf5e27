"""Predicts what models of 1 B and 8 B parameters would take on this machine, of which a few layers are timed."""

import contextlib
import statistics
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ..decode.attach import make_sparse
from ..decode.stats import Cycle
from .prediction import Costs, expected_events, match_rates
from .reads import bytes_of_forwards
from .timing import timed_run


SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}  # of Llama 3.2 and 3.1, which have these in common:
_COMMON = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
DRAFT_DTYPES = ("int8", "int4")
KERNEL_SIZES = (4, 8, 16)
_MOST_LAYERS = 4
_KERNEL_SIZE = 8  # with which acceptance is measured


def acceptance(
    model: PreTrainedModel, prompts: Sequence[BatchEncoding], max_new_tokens: int
) -> dict[str, list[list[float]]]:
    """Returns by `draft_dtype`, nothing dropped, for each output the rates that `match_rates` tells."""
    rates = {}
    for draft_dtype in DRAFT_DTYPES:
        options = {"density": 1.0, "draft_dtype": draft_dtype, "threshold": 1.0, "kernel_size": _KERNEL_SIZE}
        with make_sparse(model, **options) as twin:
            runs = [timed_run(model, twin, prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
        rates[draft_dtype] = [match_rates(run.cycles) for run in runs]
    return rates


def predict(
    name: str,
    rates: dict[str, list[list[float]]],
    bandwidth: float,
    context: int,
    max_new_tokens: int,
    num_repeats: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> dict[str, Any]:
    """Predicts decoding at the shapes of a model, which is not built: what forwards take is timed of one layer and of
    as many as fit into half of the free memory, at most 4, with random weights, and drawn out to all layers on a
    straight line; how many tokens are kept is what another model's drafts had.

    Args:
        name: in `SHAPES`.
        rates: what [`acceptance`] returned.
        bandwidth: bytes per second that memory gives.
        context: tokens before the output.

    Returns:
        dict: `is_predicted`; `layers_timed`; `costs`, in seconds, of all layers; `rows`, of the dense model and of
        each draft with the number of tokens per cycle that promises the least time: `seconds_per_token`, `ratio`, `aal`
        (tokens per forward of the full model), `acceptance_rate`, `bytes_per_token`, and the `bound_seconds_per_token`
        that the bandwidth sets. Or `reason`, where two layers do not fit.
    """
    shape = {**_COMMON, **SHAPES[name]}
    num_layers = shape["num_hidden_layers"]
    told = {"shape": name, "is_predicted": True, "num_layers": num_layers}
    num_timed = _num_fitting(shape, dtype, device)
    if num_timed < 2:
        return {**told, "reason": "two layers do not fit into half of the free memory"}
    model = random_model({**shape, "num_hidden_layers": num_timed}, dtype, device)
    ids = torch.arange(context, device=device)[None] % shape["vocab_size"]
    prompt = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    timed = [_timed(model, n, prompt, num_repeats) for n in (1, num_timed)]
    costs = _drawn_out(*timed, 1, num_timed, num_layers)
    rows = [_row(costs, "int8", [[0.0]], 1, context, max_new_tokens, bandwidth)]  # nothing is drafted
    for draft_dtype in DRAFT_DTYPES:
        drafts = [
            _row(costs, draft_dtype, rates[draft_dtype], kernel_size, context, max_new_tokens, bandwidth)
            for kernel_size in KERNEL_SIZES
        ]
        rows.append(min(drafts, key=lambda row: row["seconds_per_token"]))
    return {**told, "layers_timed": [1, num_timed], "context": context, "costs": costs, "rows": rows}


def _row(
    costs: dict[str, Any],
    draft_dtype: str,
    rates: list[list[float]],
    kernel_size: int,
    context: int,
    max_new_tokens: int,
    bandwidth: float,
) -> dict[str, Any]:
    """Returns the figures of outputs with these rates, with so many tokens per cycle: those of the dense model at 1."""
    draft = costs[draft_dtype]
    num_steps, verifications = _events(rates, kernel_size, max_new_tokens)
    num_full, num_tokens = sum(verifications.values()), sum(map(len, rates))
    of_size = Costs(costs["dense_step"], draft["verifications"] if num_steps else {}, {}, {})
    seconds = num_steps * draft["draft_step"]
    seconds += sum(number * of_size.verification(size) for size, number in verifications.items())
    cache = draft["bytes"]["cache"] * (context + max_new_tokens / 2)
    num_bytes = num_full * (draft["bytes"]["model"] + cache) + num_steps * (draft["bytes"]["draft"] + cache)
    return {
        "way": "dense" if kernel_size == 1 else f"sirius, {draft_dtype}",
        "kernel_size": kernel_size,
        "seconds_per_token": seconds / num_tokens,
        "ratio": seconds / num_tokens / costs["dense_step"],
        "aal": num_tokens / num_full,
        "acceptance_rate": (num_tokens - num_full) / num_steps if num_steps else None,
        "bytes_per_token": num_bytes / num_tokens,
        "bound_seconds_per_token": num_bytes / num_tokens / bandwidth,
    }


def _events(rates: list[list[float]], kernel_size: int, max_new_tokens: int) -> tuple[float, dict[int, float]]:
    """Returns what `expected_events` does, of several outputs."""
    total_steps, total = 0.0, dict[int, float]()
    for of_output in filter(None, rates):
        num_steps, verifications = expected_events(of_output, kernel_size, max_new_tokens - 1)
        total_steps += num_steps
        for size, number in verifications.items():
            total[size] = total.get(size, 0.0) + number
    return total_steps, total


def random_model(shape: dict[str, int], dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """Returns a Llama with random weights. Its head is the embedding, which takes a forward no longer."""
    no_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(**shape, **no_ids, tie_word_embeddings=True, max_position_embeddings=131072)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.uniform_(-0.03, 0.03)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # whose frequencies are no parameters
    return model


def _num_fitting(shape: dict[str, int], dtype: torch.dtype, device: str) -> int:
    is_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if is_gpu else psutil.virtual_memory().available
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**{**shape, "num_hidden_layers": n})).parameters())
            for n in (0, 1)
        ]
    each = dtype.itemsize + 2  # and the drafts, in 8 and in 4 bits with their scales
    head = sizes[0] * each  # at most: it may be tied to the embedding
    return min(_MOST_LAYERS, int((free / 2 - head) // ((sizes[1] - sizes[0]) * each)))


def _timed(model: PreTrainedModel, num_layers: int, prompt: BatchEncoding, num_repeats: int) -> dict[str, Any]:
    """Returns medians of seconds, and the bytes of forwards, of the model's first layers."""
    all_layers, layers = model.config.num_hidden_layers, model.model.layers
    model.config.num_hidden_layers, model.model.layers = num_layers, layers[:num_layers]
    # In turn a dense step and a draft of each length; behind them dense steps, as far as drafts were not kept.
    kernel_sizes = [*(size for kernel_size in KERNEL_SIZES for size in (1, kernel_size)), 1]
    options = {"density": 1.0, "threshold": 1.0, "kernel_size": kernel_sizes}
    dense: list[float] = []
    cycles: dict[str, list[Cycle]] = {draft_dtype: [] for draft_dtype in DRAFT_DTYPES}
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, model.model, "layers", layers)
        undo.callback(setattr, model.config, "num_hidden_layers", all_layers)
        twins = {name: undo.enter_context(make_sparse(model, **options, draft_dtype=name)) for name in cycles}
        num_bytes = {name: bytes_of_forwards(model, twin, prompt) for name, twin in twins.items()}
        for i in range(1 + num_repeats):  # of which the first loads what is used for the first time
            run = timed_run(model, None, prompt, max_new_tokens=1 + len(kernel_sizes))
            dense += run.verifications if i else []
            for name, twin in twins.items():
                run = timed_run(model, twin, prompt, max_new_tokens=1 + sum(kernel_sizes))
                cycles[name] += run.cycles[: len(kernel_sizes)] if i else []
    return {
        "dense_step": statistics.median(dense),
        **{name: {**_medians(of_draft), "bytes": num_bytes[name]} for name, of_draft in cycles.items()},
    }


def _medians(cycles: Sequence[Cycle]) -> dict[str, Any]:
    sizes = {size: [c for c in cycles if len(c.drafted_ids) == size - 1] for size in (1, *KERNEL_SIZES)}
    return {
        "draft_step": statistics.median(c.draft_seconds / c.num_steps for c in cycles if c.num_steps),
        "verifications": {
            size: statistics.median(c.verification_seconds for c in of_size) for size, of_size in sizes.items()
        },
    }


def _drawn_out(few: Any, many: Any, num_few: int, num_many: int, num_all: int) -> Any:
    """Returns values at a number of layers, on the straight line through those at two others."""
    if isinstance(few, dict):
        return {name: _drawn_out(few[name], many[name], num_few, num_many, num_all) for name in few}
    return few + (many - few) * (num_all - num_few) / (num_many - num_few)
