"""Compares drafts of one model: how often they agree, how many bytes a step needs, and what a generation takes."""

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..decode.attach import make_sparse
from ..decode.sparse_twin import SparseTwin
from .machine import describe_machine
from .named_models import model_path, own_prompts
from .problems import tokenize
from .reads import draft_bytes, num_weights
from .timing import timed_run


DTYPES = (None, "int8", "int4")
SETTINGS = (
    *({"density": 1.0, "draft_dtype": dtype} for dtype in DTYPES[1:]),
    *({"density": 1.0, "draft_dtype": dtype, "draft_head": "shortlist"} for dtype in DTYPES),
    *(
        {"method": method, "density": density, "draft_dtype": dtype}
        for method, densities in (("griffin", (0.5, 0.8)), ("cats", (0.3, 0.7)), ("teal", (0.5, 0.7)))
        for density in densities
        for dtype in DTYPES
    ),
    {"method": "griffin", "density": 0.5, "draft_dtype": "int8", "reselect_every": 1},
    *({"method": "teal", "density": density, "weighting": "column"} for density in (0.5, 0.7)),
)


def compare_drafts(
    model: str = "reasoner",
    num_prompts: int = 6,
    max_new_tokens: int = 64,
    kernel_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    record: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> dict[str, Any]:
    """Runs every kind of draft on a model's own prompts, greedy and at threshold 1.0, in turn with the dense model.

    Args:
        model: `"reasoner"` or `"smollm2"`.
        record: is given what there is so far, after each draft.

    Returns:
        dict: `machine`, `model`, `kernel_size`; `left_out`, the drafts that do not run here; `rows`, one for each other
        draft, with its fields, `agreement` (the share of the dense output's tokens that are the draft's argmax behind
        the tokens before them, all neurons chosen by the prompt), `aal`, `bytes` (what the weights that a step needs
        take, as a share of the model's in bfloat16), `ratio` (the median over prompts of the time of a whole
        generation, over the dense one's), and `num_identical` outputs. Prompts whose answer is a single token, behind
        which no draft reads anything, do not count.

    Raises:
        `ValueError` if every answer is a single token.
    """
    path = model_path(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    prompts = [tokenize(text, tokenizer, chat).to(device) for text, chat in own_prompts(model)[:num_prompts]]
    answers = [timed_run(loaded, None, prompt, max_new_tokens=min(max_new_tokens, 2)) for prompt in prompts]
    prompts = list(itertools.compress(prompts, (answer.num_tokens > 1 for answer in answers)))
    if not prompts:
        raise ValueError(
            f"every answer ({len(answers)} of num_prompts={num_prompts}) is a single token, behind which a draft has "
            f"nothing to read: take more prompts, and a max_new_tokens of at least 2, got {max_new_tokens}"
        )
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    figures = {
        "machine": describe_machine(device),
        "model": model,
        "dtype": str(dtype),
        "num_prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "kernel_size": kernel_size,
        "rows": rows,
        "left_out": left_out,
    }
    for fields in tqdm(SETTINGS, desc="drafts"):
        try:
            twin = make_sparse(loaded, threshold=1.0, kernel_size=kernel_size, **fields)
        except (ValueError, ImportError) as error:
            left_out.append({**fields, "reason": str(error)})
            continue
        with twin:
            for each in (None, twin):  # what is loaded lazily is not timed
                timed_run(loaded, each, prompts[0], max_new_tokens=8)
            twin.stats.reset()
            agrees, num_bytes_read, ratios, num_identical = [], [], [], 0
            for prompt in prompts:
                dense, sirius = (
                    timed_run(loaded, each, prompt, max_new_tokens=max_new_tokens) for each in (None, twin)
                )
                ratios.append(sirius.seconds / dense.seconds)
                num_identical += torch.equal(sirius.output_ids, dense.output_ids)
                found, read = read_along(loaded, twin, dense.output_ids, prompt["input_ids"].shape[1], kernel_size)
                agrees.append(found)
                num_bytes_read.append(read)
            rows.append(
                {
                    **fields,
                    "agreement": torch.cat(agrees).double().mean().item(),
                    "aal": twin.stats.total.aal,
                    "bytes": statistics.fmean(num_bytes_read),
                    "ratio": statistics.median(ratios),
                    "num_identical": num_identical,
                }
            )
        record(figures)
    return figures


@torch.no_grad()
def read_along(
    model: PreTrainedModel, twin: SparseTwin, output_ids: torch.LongTensor, num_prompt: int, num_tokens: int
) -> tuple[torch.Tensor, float]:
    """Has a draft read an output of the dense model's.

    Args:
        output_ids: long [1, length], greedy, which begins with the prompt.
        num_prompt: the length of the prompt.
        num_tokens: how many a draft reads, after which the next one begins.

    Returns:
        whether each token is the draft's argmax behind those before it, bool [num_new_tokens - 1] (the first one is the
        dense model's in any case); and the bytes of the projections that a step needs, over those of the model in
        bfloat16.
    """
    with twin.new_call() as call:
        with call.draft.observing(None):
            outputs = model(output_ids[:, :num_prompt], use_cache=True, return_dict=True)
        call.draft.select()
        found = []
        for read in output_ids[:, num_prompt:-1].split(num_tokens, dim=1):
            with call.draft.drafting():
                logits = twin(read, past_key_values=outputs.past_key_values, return_dict=True).logits[0]
            found.append(logits.argmax(dim=-1))
        share = draft_bytes(call.draft) / (2 * num_weights(call.draft))
        return torch.cat(found) == output_ids[0, num_prompt + 1 :], share
