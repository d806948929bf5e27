"""The tree of a draft: its nodes, their paths, and the one that wins."""

import itertools
from typing import NamedTuple

import torch


class Leaf(NamedTuple):
    """Where a continuation ends."""

    node: int  # its last node
    log_prob: float  # the draft's log-probability of the continuation
    # whether the call would stop at the token that comes next. It is no node, as it is left to the dense model,
    # but counts in `log_prob`
    is_end: bool


class Tree:
    """Drafted tokens, parents before children. Node 0 is the last verified token, the root.

    Attributes:
        token_ids, parents, depths: of each node; the root's parent is -1 and its depth 0.
        log_probs: the draft's log-probability of each node's path from the root.
        leaves: where the continuations end, the likeliest first.
        likeliest: the end of the path of each node's likeliest token, which a draft without branches would write.
    """

    def __init__(self, root_id: int):
        self.token_ids: list[int] = [root_id]
        self.parents: list[int] = [-1]
        self.depths: list[int] = [0]
        self.log_probs: list[float] = [0.0]
        self.leaves: list[Leaf] = []
        self.likeliest = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def add(self, parent: int, token_id: int, log_prob: float) -> int:
        """Adds a child, and returns its number."""
        self.token_ids.append(token_id)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.log_probs.append(log_prob)
        return len(self) - 1

    def path(self, node: int) -> list[int]:
        """Returns the nodes on the way from the root, which is left out, to a node."""
        nodes = []
        while node > 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def path_ids(self, node: int) -> tuple[int, ...]:
        return tuple(self.token_ids[n] for n in self.path(node))

    def children(self, node: int) -> list[int]:
        """Returns the children of a node, the likeliest first."""
        children = [child for child, parent in enumerate(self.parents) if parent == node]
        return sorted(children, key=lambda child: -self.log_probs[child])

    def pruned(self) -> "Tree":
        """Returns a tree of the nodes that lead to a leaf."""
        kept = sorted({n for leaf in self.leaves for n in self.path(leaf.node)})
        new = {0: 0}
        tree = Tree(self.token_ids[0])
        for node in kept:
            new[node] = tree.add(new[self.parents[node]], self.token_ids[node], self.log_probs[node])
        tree.leaves = [leaf._replace(node=new[leaf.node]) for leaf in self.leaves]
        tree.likeliest = new[self.likeliest]
        return tree

    def likeliest_length(self, accepted_children: dict[int, list[int]]) -> int:
        """Returns how many tokens would be kept had the draft no branches."""
        path = self.path(self.likeliest)
        is_kept = (node in accepted_children.get(parent, ()) for parent, node in zip([0, *path], path, strict=False))
        return sum(itertools.takewhile(bool, is_kept))

    def lineage(self, first: int = 0) -> torch.Tensor:
        """Returns bool [num_nodes - first, num_nodes]: whether the second, any node, is the first, one of those from
        `first` on, or one of its ancestors.
        """
        lineage = torch.zeros(len(self) - first, len(self), dtype=torch.bool)
        lineage[:, 0] = True
        places = [(node - first, other) for node in range(first, len(self)) for other in self.path(node)]
        if places:
            lineage[tuple(torch.tensor(places).T)] = True
        return lineage


def best_path(tree: Tree, accepted_children: dict[int, list[int]]) -> list[int]:
    """Returns the longest path of accepted nodes; of several, the likeliest to the draft.

    Args:
        accepted_children: of each accepted node, the root included.
    """
    ends = [0]
    for node in ends:  # grows meanwhile
        ends.extend(accepted_children.get(node, ()))
    return tree.path(max(ends, key=lambda node: (tree.depths[node], tree.log_probs[node])))


def ids_at(verified_ids: torch.LongTensor, tree: Tree, node: int) -> torch.LongTensor:
    """Returns the tokens up to a node, long [1, length]: the verified ones and its path."""
    return torch.cat([verified_ids, verified_ids.new_tensor([tree.path_ids(node)], dtype=torch.long)], dim=-1)
