"""The verification of a tree: one forward of the dense model over all its nodes, of which one path wins."""

import dataclasses
import math

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..draft.proposers import Proposal, likelihood
from ..draft.tree import best_path, ids_at
from ..settings.config import SiriusConfig
from .stats import Branches
from .verification import is_accepted


class PathProcessor(LogitsProcessor):
    """Runs a call's processors up to the end of the path that won. Positions past it hold padding, which processors
    must not see.
    """

    def __init__(self, processors: LogitsProcessorList):
        self.processors = processors
        self.end = math.inf

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        return scores if input_ids.shape[1] > self.end else self.processors(input_ids, scores)


@dataclasses.dataclass
class Verdict:
    """What the dense model says of a tree."""

    path: list[int]  # the nodes that it keeps, from the root on, which is left out
    rejecting_id: int  # a token that it does not choose behind them
    branches: Branches  # the same as the statistics tell it


def judge(
    proposal: Proposal,
    verified_ids: torch.LongTensor,
    logits: torch.Tensor,
    processors: LogitsProcessorList,
    config: SiriusConfig,
) -> Verdict:
    """Applies the acceptance rule to a tree behind `verified_ids`, long [1, length], by the dense model's logits at
    each node, [1, num_nodes, vocab_size].
    """
    tree = proposal.tree

    def scores_at(node: int) -> torch.Tensor:
        scores = logits[:, node].to(dtype=torch.float32, device=verified_ids.device, copy=True)
        return processors(ids_at(verified_ids, tree, node), scores)

    reached, accepted, likelihoods = [0], {}, {}
    for node in reached:  # grows meanwhile
        if not (children := tree.children(node)):
            continue
        token_ids = verified_ids.new_tensor([tree.token_ids[child] for child in children])
        scores = scores_at(node).expand(len(children), -1)
        is_kept = is_accepted(token_ids, scores, config.threshold, config.temperature).tolist()
        likelihoods.update(zip(children, likelihood(token_ids, scores, config.temperature).tolist(), strict=True))
        accepted[node] = [child for child, kept in zip(children, is_kept, strict=True) if kept]
        reached += accepted[node]
    path = best_path(tree, accepted)
    rejecting_scores = scores_at(path[-1] if path else 0)
    branches = dataclasses.replace(
        unread(proposal).branches,
        leaf_likelihoods=tuple(tuple(map(likelihoods.get, tree.path(leaf.node))) for leaf in tree.leaves),
        winner=next(i for i, leaf in enumerate(tree.leaves) if tree.path(leaf.node)[: len(path)] == path),
        likeliest_advance_length=tree.likeliest_length(accepted) + 1,
    )
    return Verdict(path, (rejecting_scores.argmax().item() + 1) % rejecting_scores.shape[-1], branches)


def unread(proposal: Proposal) -> Verdict:
    """Returns what is known of a tree before the dense model reads it: nothing is kept."""
    leaf_ids = tuple(proposal.tree.path_ids(leaf.node) for leaf in proposal.tree.leaves)
    no_likelihoods = tuple((None,) * len(ids) for ids in leaf_ids)
    num_nodes = len(proposal.tree) - 1
    return Verdict([], 0, Branches(leaf_ids, no_likelihoods, 0, proposal.num_nodes_drafted, num_nodes, 1))
