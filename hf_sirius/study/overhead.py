"""What the package itself takes for each drafted token."""

import itertools
import statistics
import time
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel

from ..decode.attach import make_sparse
from ..decode.sparse_twin import SparseTwin
from .timing import synchronize, timed_run


_KERNEL_SIZE = 9
_NUM_CYCLES = 3


@torch.no_grad()
def step_overhead(model: PreTrainedModel, prompt: BatchEncoding, num_repeats: int) -> dict[str, Any]:
    """Times draft steps that read the model's own weights, all of them, and bare forwards of one token, in alternation.

    A draft step has all that the package does for a token: its modules, the inputs, the processors, the criteria. A
    bare forward is `model(...)` over a KV-cache, with the same products.

    Returns:
        dict: `draft_step` and `bare_forward`, medians in seconds, and `overhead`, by how much of a bare forward the
        first is above the second.
    """
    steps, forwards = [], []
    with make_sparse(model, density=1.0, threshold=1.0, kernel_size=_KERNEL_SIZE) as twin:
        for _ in range(1 + num_repeats):
            run = timed_run(model, twin, prompt, max_new_tokens=1 + _NUM_CYCLES * _KERNEL_SIZE)
            steps.append(run.draft_steps)
            forwards.append(_bare_forwards(model, twin, prompt, len(run.draft_steps)))
    # The first ones load what is used for the first time.
    step, bare = (statistics.median(itertools.chain(*seconds[1:])) for seconds in (steps, forwards))
    return {"draft_step": step, "bare_forward": bare, "overhead": step / bare - 1}


def _bare_forwards(model: PreTrainedModel, twin: SparseTwin, prompt: BatchEncoding, num_forwards: int) -> list[float]:
    seconds = []
    with twin.new_call() as call:
        cache = model(**prompt, use_cache=True, return_dict=True).past_key_values
        token_ids = prompt["input_ids"][:, -1:]
        with call.draft.verifying(1):
            for _ in range(num_forwards):
                synchronize(model.device)
                start = time.perf_counter()
                logits = model(input_ids=token_ids, past_key_values=cache, return_dict=True).logits
                synchronize(model.device)
                seconds.append(time.perf_counter() - start)
                token_ids = logits[:, -1:].argmax(dim=-1)
    return seconds
