"""The draft of a user who sets nothing: the one that promises the least time per token on this machine."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch import nn
from transformers import PreTrainedModel

from ..model.accelerate_hooks import execution_device, is_offloaded
from ..model.observation import evaluating, is_compiled
from ..model.sites import PROJECTIONS, MlpSite, find_other_modules, projection_shape
from ..weights.formats import changes, check_draft_dtype, draft_linear, num_bytes


# Fields of the config that say what a draft is: who gives any of them has chosen.
CHOSEN = ("method", "density", "selection", "calibration", "draft_dtype", "draft_scope", "draft_memory",
          "reselect_every", "weighting", "tree_width", "branch_cutoff")  # fmt: skip
# The share of tokens at which a draft of this dtype, nothing dropped, is the full model's argmax: of SmolLM2 off its
# 4-bit grid, by the benchmark in the README.
AGREEMENT = {"int8": 0.98, "int4": 0.88}
KERNEL_SIZES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_NUM_WEIGHTS = 2**24  # that are timed: more than the caches hold, and read in milliseconds
_NUM_TOKENS = 16  # of which products are timed as well, for verifications
_NUM_REPEATS = 5
_chosen: dict[tuple, dict[str, Any]] = {}


@torch.no_grad()
def choose_draft(model: PreTrainedModel, sites: list[MlpSite], offloaded_kernel_size: int) -> dict[str, Any]:
    """Returns the fields of the config that promise the least time per token.

    A cycle of K tokens is K - 1 draft steps and a forward over K tokens, and advances by (1 - a^K) / (1 - a) tokens
    on average, where a is the share of tokens at which the draft agrees. One forward and the products of each format
    are timed, at the shapes of this model's MLPs, in less than a second; the answer is remembered as long as the
    process lives. Weights that are offloaded are not timed: a verification takes longest by far there. The draft has to
    fit into half of the memory that is free; where none does or can run, griffin drafts, whose neurons are the model's.

    Args:
        model: the dense model.
        sites: its MLPs.
        offloaded_kernel_size: tokens per cycle of a model whose weights are streamed.
    """
    device = execution_device(model)
    others = [getattr(*place) for place in find_other_modules(model, sites)]
    projections = [module for module in others if isinstance(module, PROJECTIONS)]
    projections += [part for site in sites for part in site.parts]
    head = model.get_output_embeddings()
    free = get_max_memory().get(device.index or 0 if device.type == "cuda" else device.type, 0)
    dtypes = [
        draft_dtype
        for draft_dtype in AGREEMENT
        if _runs(draft_dtype, device)
        and all(changes(part, draft_dtype) for part in sites[0].parts)
        and 2 * sum(num_bytes(part, "int8" if part is head else draft_dtype) for part in projections) <= free
    ]
    if not dtypes:
        return {"method": "griffin"}
    if is_offloaded(model):
        draft_dtype = max(dtypes, key=AGREEMENT.__getitem__)
        return {"density": 1.0, "draft_dtype": draft_dtype, "kernel_size": offloaded_kernel_size}
    shapes = tuple(map(projection_shape, sites[0].parts))
    sizes = [out_features * in_features for out_features, in_features in map(projection_shape, projections)]
    key = (device, model.dtype, type(sites[0].gate), shapes, sum(sizes), torch.get_num_threads(), *dtypes)
    if key not in _chosen:
        _chosen[key] = _fastest(model, sites, sum(sizes), dtypes, device)
    return _chosen[key]


def _runs(draft_dtype: str, device: torch.device) -> bool:
    try:
        check_draft_dtype(draft_dtype, device)
    except (ValueError, ImportError):
        return False
    return True


def _fastest(
    model: PreTrainedModel, sites: list[MlpSite], num_weights: int, dtypes: list[str], device: torch.device
) -> dict[str, Any]:
    parts, num_timed = [], 0
    for part in itertools.chain.from_iterable(site.parts for site in sites):
        if num_timed >= _NUM_WEIGHTS:
            break
        parts.append(part)
        num_timed += functools.reduce(int.__mul__, projection_shape(part))

    def products(linears: list[nn.Module], num_tokens: int) -> float:
        """Returns the seconds of all the model's products, by those of some."""
        inputs = [torch.ones(num_tokens, projection_shape(part)[1], dtype=model.dtype, device=device) for part in parts]

        def run() -> None:
            for linear, states in zip(linears, inputs, strict=True):
                linear(states)

        return _seconds(run, device) * num_weights / num_timed

    token_id = torch.full((1, 1), model.config.get_text_config().vocab_size // 2, device=device)
    with evaluating(model), torch.compiler.set_stance("force_eager" if is_compiled(model) else "default"):
        step = _seconds(lambda: model(token_id, use_cache=False), device)
        own, own_many = products(parts, 1), products(parts, _NUM_TOKENS)
    seconds_per_token = {}
    for draft_dtype in dtypes:
        casts = [draft_linear(part, draft_dtype, compute_dtype=model.dtype) for part in parts]
        draft_step = max(step - own, 0.0) + products(casts, 1)
        for kernel_size in KERNEL_SIZES:
            verification = step + max(own_many - own, 0.0) * (kernel_size - 1) / (_NUM_TOKENS - 1)
            advance = sum(AGREEMENT[draft_dtype] ** i for i in range(kernel_size))
            seconds = ((kernel_size - 1) * draft_step + verification) / advance
            seconds_per_token[draft_dtype, kernel_size] = seconds
    draft_dtype, kernel_size = min(seconds_per_token, key=seconds_per_token.__getitem__)
    return {"density": 1.0, "draft_dtype": draft_dtype, "kernel_size": kernel_size}


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the median of a few runs, of fewer where one takes long."""
    seconds = []
    while len(seconds) <= _NUM_REPEATS and sum(seconds) < 0.1:  # the first one warms up
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:] or seconds)
