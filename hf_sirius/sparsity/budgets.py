"""TEAL's greedy budgets (arXiv 2408.14690, section 4.3 and algorithm 1): how many inputs each projection of a block
keeps, so that the block's output changes least.
"""

from collections.abc import Callable

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..model.observation import intercepting, uncompiled
from ..model.projections import projection_shape
from ..model.sites import ProjectionSite, find_block
from ..settings.calibration import CALIBRATED_DENSITIES
from .scores import InputScores


STEP = 5  # hundredths that a projection gives up at a time
MAX_TOKENS = 128  # of the corpus, that a block is run on


@torch.no_grad()
def greedy_budgets(
    model: PreTrainedModel,
    sites: list[ProjectionSite],
    texts: list[torch.LongTensor],
    table: torch.Tensor,
    scores: InputScores,
    progress: bool = True,
) -> torch.Tensor:
    """Returns the density of each projection when that of its block is (i + 1) / 100, float32 [num_sites, 100].

    A block starts with all inputs. Again and again the projection gives up .05 of its inputs for which the error of the
    block's output grows least per parameter that is left unread. (The paper's steps are an equal share of the block's
    parameters; a small projection has no such share to give.) The error is the squared L2 distance from the dense
    output over that output's square, summed over tokens: the paper's, but for a few tokens with large states, which
    would else decide alone. How much it grows is measured anew for the best candidate alone, until the best one is up
    to date. The first token of a text, which no draft reads, keeps all. A projection outside of any block has the
    uniform density.

    Args:
        model: the dense model, in evaluation.
        sites: its projections.
        texts: token ids, long [1, length] each, of at most `MAX_TOKENS` in all; blocks run again on what the dense
            model gives them.
        table: float32 [num_sites, 100], the cutoffs of each projection at these densities.
        scores: what is compared with them.
        progress: whether to show a progress bar.

    Raises:
        `ValueError` if a block does not run by itself, or no text has two tokens.
    """
    if all(text.shape[1] < 2 for text in texts):
        raise ValueError("budget='greedy' compares what follows the first token: pass a text of at least 2 tokens")
    members = _blocks(model, sites)
    inputs = _block_inputs(model, [model.get_submodule(name) for name in members], texts)
    budgets = torch.tensor(CALIBRATED_DENSITIES).repeat(len(sites), 1)
    blocks = zip(members.items(), inputs, strict=True)
    for (name, inside), calls in tqdm(blocks, total=len(members), unit="block", disable=not progress, desc="budgets"):
        error_of = _error_of(model, name, inside, calls, table, scores)
        sizes = [float(torch.tensor(projection_shape(site.module)).prod()) for site in inside]
        path = torch.tensor(_descend(error_of, sizes), dtype=torch.float64) / 100
        budgets[[site.idx for site in inside]] = _at_hundredths(path, torch.tensor(sizes, dtype=torch.float64)).float()
    return budgets


@torch.no_grad()
def check_blocks(model: PreTrainedModel, sites: list[ProjectionSite], input_ids: torch.LongTensor) -> None:
    """Raises `ValueError` if a block does not run by itself on what the model gives it.

    Args:
        input_ids: long [1, length].
    """
    names = list(_blocks(model, sites))
    inputs = _block_inputs(model, [model.get_submodule(name) for name in names], [input_ids])
    for name, calls in zip(names, inputs, strict=True):
        _dense_outputs(model, name, calls)


def _blocks(model: PreTrainedModel, sites: list[ProjectionSite]) -> dict[str, list[ProjectionSite]]:
    """Returns the projections in each block, by its name."""
    members: dict[str, list[ProjectionSite]] = {}
    for site in sites:
        if (name := find_block(model, site)) is not None:
            members.setdefault(name, []).append(site)
    return members


def _dense_outputs(model: PreTrainedModel, name: str, calls: list[tuple[tuple, dict]]) -> list[torch.Tensor]:
    """Returns a block's outputs. Raises `ValueError` if it does not run by itself."""
    try:
        with uncompiled(model):
            return _outputs(model.get_submodule(name), calls)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        if should_reduce_batch_size(error):  # a full device
            raise
        raise ValueError(
            f"{name} of this {type(model).__name__} does not run by itself ({error}), as budget='greedy' needs: "
            "calibrate with budget='uniform'"
        ) from error


def _outputs(block: nn.Module, calls: list[tuple[tuple, dict]]) -> list[torch.Tensor]:
    outputs = [block(*args, **kwargs) for args, kwargs in calls]
    return [output if isinstance(output, torch.Tensor) else output[0] for output in outputs]


def _block_inputs(
    model: PreTrainedModel, blocks: list[nn.Module], texts: list[torch.LongTensor]
) -> list[list[tuple[tuple, dict]]]:
    """Returns what the dense model calls each block with, as (args, kwargs)."""
    calls: list[list[tuple[tuple, dict]]] = [[] for _ in blocks]

    def record(idx: int, args: tuple, kwargs: dict) -> None:
        calls[idx].append((args, kwargs))

    with intercepting(model, blocks, record):
        for input_ids in texts:
            model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    return calls


def _error_of(
    model: PreTrainedModel,
    name: str,
    sites: list[ProjectionSite],
    calls: list[tuple[tuple, dict]],
    table: torch.Tensor,
    scores: InputScores,
) -> Callable[[list[int]], float]:
    """Returns what tells the error of a block's output, at the densities of its projections in hundredths."""
    block = model.get_submodule(name)
    levels = [100] * len(sites)

    def drop(idx: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if levels[idx] == 100:
            return None
        inputs, site_idx = args[0], sites[idx].idx
        is_kept = scores(site_idx, inputs) >= table[site_idx, levels[idx] - 1].item()
        is_kept[..., 0, :] = True
        return (inputs * is_kept, *args[1:]), kwargs

    def run() -> list[torch.Tensor]:
        with intercepting(model, [site.module for site in sites], drop):
            return _outputs(block, calls)

    dense = _dense_outputs(model, name, calls)
    squares = [_squares(output).clamp(min=torch.finfo(torch.float32).tiny) for output in dense]

    def error_of(tried: list[int]) -> float:
        levels[:] = tried
        triples = zip(run(), dense, squares, strict=True)
        return sum((_squares(found - expected) / square).sum().item() for found, expected, square in triples)

    return error_of


def _squares(states: torch.Tensor) -> torch.Tensor:
    """Returns the squared norm of each token's states, [..., num_tokens]."""
    return states.float().square().sum(dim=-1)


def _descend(error_of: Callable[[list[int]], float], sizes: list[float]) -> list[list[int]]:
    """Returns the densities of a block's projections from step to step, in hundredths, from 100 down to 1.

    Args:
        error_of: tells the error at such densities.
        sizes: the parameters of each projection.
    """
    levels, error = [100] * len(sizes), 0.0
    path = [levels.copy()]
    steps = {}  # projection -> (error that its next step adds per parameter, the error then, when it was measured)

    def lowered(idx: int) -> list[int]:
        return [max(level - STEP, 1) if i == idx else level for i, level in enumerate(levels)]

    def measure(idx: int) -> None:
        tried = lowered(idx)
        found = error_of(tried)
        steps[idx] = (found - error) / (sizes[idx] * (levels[idx] - tried[idx])), found, len(path)

    for idx in range(len(sizes)):
        measure(idx)
    while steps:
        idx = min(steps, key=lambda i: steps[i][0])
        _, found, when = steps[idx]
        if when < len(path):
            measure(idx)
            continue
        levels, error = lowered(idx), found
        path.append(levels)
        if levels[idx] > 1:
            measure(idx)
        else:
            del steps[idx]
    return path


def _at_hundredths(path: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Returns the densities of a block's projections where their mean, weighted by size, is each hundredth.

    Args:
        path: [num_steps, num_sites], falling from 1 to .01.
        sizes: [num_sites].

    Returns:
        [num_sites, 100].
    """
    path = path.flip(0)
    means = path @ (sizes / sizes.sum())
    wanted = torch.tensor(CALIBRATED_DENSITIES, dtype=path.dtype)
    high = torch.searchsorted(means, wanted).clamp_(1, len(path) - 1)
    weight = ((wanted - means[high - 1]) / (means[high] - means[high - 1])).clamp_(0, 1)
    return torch.lerp(path[high - 1], path[high], weight[:, None]).T
