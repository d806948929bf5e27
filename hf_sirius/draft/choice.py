"""The draft of a user who sets nothing: the one that promises the least time per token on this machine."""

import bisect
import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.accelerate_hooks import execution_device, is_offloaded
from ..model.encoder_decoder import text_inputs
from ..model.observation import evaluating, is_compiled, uncompiled
from ..model.projections import device_of, is_projection, plain_tensors, projection_shape
from ..model.sites import MlpSite, find_other_modules
from ..weights.formats import changes, dense_weight, draft_linear, head_dtype, num_bytes, runs
from ..weights.joint import JointProducts
from ..weights.kept import cast_dtypes
from ..weights.linear import has_kernel, is_kernel_faster, kernel_products
from ..weights.shortlist import SHORTLIST, has_shortlist, likeliest, num_read


# Fields of the config that say what a draft is: who gives any of them has chosen.
CHOSEN = ("method", "density", "selection", "calibration", "draft_dtype", "draft_scope", "draft_head", "draft_memory",
          "reselect_every", "weighting", "budget", "tree_width", "branch_cutoff")  # fmt: skip
# The share of tokens at which a draft of this dtype, nothing dropped, is the full model's argmax: of SmolLM2 off its
# 4-bit grid, 24 prompts, by `hf-sirius bench drafts`.
AGREEMENT = {"int8": 0.986, "int4": 0.889}
_SHORTLIST_AGREEMENT = 0.994  # the same of a whole draft in the model's own dtype whose head has a shortlist
_LARGE_HEAD = 0.1  # the share of all weights from which a head may have one
KERNEL_SIZES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_NUM_WEIGHTS = 2**25  # that are timed: in 8 bits more than most caches hold, and read in milliseconds
_NUM_TOKENS = (1, 4, 8, 16, 32)  # of which products are timed, for verifications
_NUM_REPEATS, _MOST_SECONDS = 5, 0.5  # rounds that are timed, unless they take longer
_chosen: dict[tuple, dict[str, Any]] = {}


@torch.no_grad()
def choose_draft(model: PreTrainedModel, sites: list[MlpSite], offloaded_kernel_size: int) -> dict[str, Any]:
    """Returns the fields of the config that promise the least time per token.

    A cycle of K tokens is K - 1 draft steps and a forward over K tokens, and advances by (1 - a^K) / (1 - a) tokens
    on average, where a is the share of tokens at which the draft agrees. A few forwards of one token and the products
    of each format are timed, at the shapes of this model's MLPs; the answer is remembered as long as the process lives,
    unless a lack of memory decided it. Weights that are offloaded are not timed: a verification takes longest by far
    there. The draft has to fit into half of the memory that is free; where none does or can run, or the model's layers
    cannot be read, the draft is of cats, which holds nothing, or of a model that is offloaded, of griffin.

    Args:
        model: the dense model.
        sites: its MLPs.
        offloaded_kernel_size: tokens per cycle of a model whose weights are streamed.
    """
    device, offloaded = execution_device(model), is_offloaded(model)
    others = [getattr(*place) for place in find_other_modules(model, sites)]
    projections = [module for module in others if is_projection(module)]
    projections += [part for site in sites for part in site.parts]
    shapes = tuple(map(projection_shape, projections))
    head = model.get_output_embeddings()
    gate = tuple((tensor.dtype, tensor.shape) for tensor in plain_tensors(sites[0].gate))
    key = (device, model.dtype, type(sites[0].gate), gate, shapes, torch.get_num_threads(), offloaded)
    key += (has_shortlist(head),)
    if key in _chosen:
        return _chosen[key]

    def missing_bytes(draft_dtype: str) -> int:
        """Returns what a draft takes beside what is kept already, which is not to change the answer."""
        dtypes = {part: head_dtype(draft_dtype, device) if part is head else draft_dtype for part in projections}
        missing = (part for part, dtype in dtypes.items() if not cast_dtypes(part) & {dtype, SHORTLIST})
        return sum(num_bytes(part, dtypes[part]) for part in missing)

    can_read = _can_read(sites[0].gate)
    running = [
        draft_dtype
        for draft_dtype in AGREEMENT
        if can_read and runs(draft_dtype, device) and all(changes(part, draft_dtype) for part in sites[0].parts)
    ]
    free = _free_memory(device)
    dtypes = [draft_dtype for draft_dtype in running if 2 * missing_bytes(draft_dtype) <= free]
    chosen: dict[str, Any]
    if not dtypes:
        chosen = {"method": "griffin" if offloaded else "cats"}
    elif offloaded:
        draft_dtype = max(dtypes, key=AGREEMENT.__getitem__)
        chosen = {"density": 1.0, "draft_dtype": draft_dtype, "kernel_size": offloaded_kernel_size}
    else:
        fastest = _fastest(model, sites, sum(map(math.prod, shapes)), head, dtypes, device)
        chosen = fastest | {"kernel_size": "auto"}  # which finds the number, or that there is none
    if dtypes == running:
        _chosen[key] = chosen
    return chosen


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _can_read(projection: nn.Module) -> bool:
    """Whether the weight of a projection can be read, without which nothing can be cast."""
    try:
        dense_weight(projection)
    except ValueError:
        return False
    return True


def _fastest(
    model: PreTrainedModel,
    sites: list[MlpSite],
    num_weights: int,
    head: nn.Module | None,
    dtypes: list[str],
    device: torch.device,
) -> dict[str, Any]:
    """Returns the fields of the fastest draft of a model with so many weights, those of its head included."""
    parts, num_timed = [], 0
    for part in itertools.chain.from_iterable(site.parts for site in sites):
        if num_timed >= _NUM_WEIGHTS:
            break
        parts.append(part)
        num_timed += math.prod(projection_shape(part))

    downs = {site.down for site in sites}

    def products_of(
        linears: list[nn.Module],
        num_tokens: int,
        product: Callable[..., torch.Tensor] = lambda linear, states: linear(states),
    ) -> Callable[[], None]:
        inputs: list[torch.Tensor] = []
        for part, before in zip(parts, [None, *parts], strict=False):
            if before is None or part in downs or before in downs:  # else gate's are up's as well
                size = 1, num_tokens, projection_shape(part)[1]
                states = torch.ones(size, dtype=model.dtype, device=device_of(part))
            inputs.append(states)

        def run() -> None:
            for linear, states in zip(linears, inputs, strict=True):
                product(linear, states)

        return run

    def verifying(num_tokens: int) -> Callable[[], None]:
        run = products_of(parts, num_tokens)
        linears = [part for part in parts if type(part) is nn.Linear and has_kernel(part)]
        is_faster = not is_compiled(model) and is_kernel_faster(linears, num_tokens)

        def run_by_kernels() -> None:
            with kernel_products(linears) if is_faster else contextlib.nullcontext():
                run()

        return run_by_kernels

    token_id = torch.full((1, 1), model.config.get_text_config().vocab_size // 2, device=device)
    with evaluating(model), uncompiled(model):
        inputs = text_inputs(model, token_id)
        runs = [lambda: model(**inputs, use_cache=False), products_of(parts, 1)]
        runs += [verifying(num_tokens) for num_tokens in _NUM_TOKENS]
        for draft_dtype in dtypes:
            casts = [draft_linear(part, draft_dtype, compute_dtype=model.dtype) for part in parts]
            runs.append(products_of(casts, 1, JointProducts()))
        rounds = _rounds(runs, device)
    share = num_weights / num_timed
    # In alternation, as what else the machine does is to meet all of them.
    around = max(0.0, statistics.median(step - share * products for step, products, *_ in rounds))
    per_weight = [statistics.median(seconds) / num_timed for seconds in zip(*rounds, strict=True)][2:]
    of_many, of_casts = per_weight[: len(_NUM_TOKENS)], per_weight[len(_NUM_TOKENS) :]
    of_dtype = dict(zip(dtypes, of_casts, strict=True))
    of_head = {dtype: of_dtype.get(head_dtype(dtype, device), seconds) for dtype, seconds in of_dtype.items()}
    num_head = 0 if head is None else math.prod(projection_shape(head))
    # The weights that each kind of head reads, what else it takes, and the share of tokens that it gets right.
    heads = {"full": (num_head, 0.0, 1.0)}
    if num_head > _LARGE_HEAD * num_weights and has_shortlist(head):
        logits = torch.randn(1, head.out_features, generator=torch.Generator().manual_seed(0)).to(device)
        seconds = statistics.median(s for (s,) in _rounds([lambda: list(likeliest(logits))], device))
        heads[SHORTLIST] = (num_read(head), seconds, _SHORTLIST_AGREEMENT)
    seconds_per_token = {}
    for draft_dtype, draft_head, kernel_size in itertools.product(dtypes, heads, KERNEL_SIZES):
        num_read_of_head, seconds_of_head, agreement = heads[draft_head]
        products = (num_weights - num_head) * of_dtype[draft_dtype]
        products += num_read_of_head * of_head[draft_dtype] + seconds_of_head
        verification = around + num_weights * _between(kernel_size, _NUM_TOKENS, of_many)
        advance = sum((agreement * AGREEMENT[draft_dtype]) ** i for i in range(kernel_size))
        seconds = ((kernel_size - 1) * (around + products) + verification) / advance
        seconds_per_token[draft_dtype, draft_head, kernel_size] = seconds
    fields = ("draft_dtype", "draft_head", "kernel_size")
    best = min(seconds_per_token, key=seconds_per_token.__getitem__)
    return {"density": 1.0, **dict(zip(fields, best, strict=True))}


def _between(place: int, places: Sequence[int], values: Sequence[float]) -> float:
    """Returns the value at a place, on the straight line between the two around it."""
    i = bisect.bisect_left(places, place, lo=1, hi=len(places) - 1)
    share = (place - places[i - 1]) / (places[i] - places[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


def _rounds(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[list[float]]:
    """Returns the seconds of each in turn, of a few rounds behind a first one, of fewer where one takes long."""
    rounds: list[list[float]] = []
    while len(rounds) < 2 or (len(rounds) <= _NUM_REPEATS and sum(map(sum, rounds)) < _MOST_SECONDS):
        rounds.append([])
        for run in runs:
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rounds[-1].append(time.perf_counter() - start)
    return rounds[1:]
