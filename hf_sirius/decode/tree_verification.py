"""The verification of a tree: one forward of the dense model over all its nodes, of which one path wins."""

import dataclasses
import math

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..draft.proposers import Proposal, likelihood
from ..draft.tree import Tree, best_path, ids_at
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
    """What the dense model says of a tree.

    Attributes:
        path: the nodes that it keeps, from the root on, which is left out.
        winner: which leaf they lead to.
        rejecting_id: a token that it does not choose behind them.
        likelihoods: its likelihood of the nodes about which it was asked.
        likeliest_advance_length: what the advance would have been without branches.
    """

    path: list[int]
    winner: int
    rejecting_id: int
    likelihoods: dict[int, float]
    likeliest_advance_length: int

    def branches(self, proposal: Proposal) -> Branches:
        """Returns the tree as the statistics tell it."""
        tree = proposal.tree
        return Branches(
            leaf_ids=tuple(tree.path_ids(leaf.node) for leaf in tree.leaves),
            leaf_likelihoods=tuple(tuple(map(self.likelihoods.get, tree.path(leaf.node))) for leaf in tree.leaves),
            winner=self.winner,
            num_nodes_drafted=proposal.num_nodes_drafted,
            num_nodes_verified=len(tree) - 1,
            likeliest_advance_length=self.likeliest_advance_length,
        )


def judge(
    tree: Tree,
    verified_ids: torch.LongTensor,
    logits: torch.Tensor,
    processors: LogitsProcessorList,
    config: SiriusConfig,
) -> Verdict:
    """Applies the acceptance rule to a tree.

    Args:
        tree: whose root is the last verified token.
        verified_ids: long [1, length].
        logits: [1, num_nodes, vocab_size], the dense model's at each node.
        processors: those of the call.
        config: the settings of the twin.
    """

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
    return Verdict(
        path=path,
        winner=next(i for i, leaf in enumerate(tree.leaves) if tree.path(leaf.node)[: len(path)] == path),
        rejecting_id=(rejecting_scores.argmax().item() + 1) % rejecting_scores.shape[-1],
        likelihoods=likelihoods,
        likeliest_advance_length=tree.likeliest_length(accepted) + 1,
    )
