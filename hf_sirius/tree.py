"""The tree of a draft: its nodes, how a forward reads them, and what of them stays in the KV-cache.

The nodes are read as one sequence over the shared KV-cache. A mask lets each see the context and its own ancestors
alone, and positions go by depth, so each has the logits that it would have at the end of its own path.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .cache import RoomyLayer
from .compat import DummyLayer
from .observation import evaluating
from .streaming import execution_device


ATTENTIONS = ("sdpa", "eager")  # the implementations that take such a mask


class Leaf(NamedTuple):
    """Where a continuation ends.

    Attributes:
        node: its last node.
        log_prob: the draft's log-probability of the continuation.
        is_end: whether the call would stop at the token that comes next. It is no node, as it is left to the dense
            model, but counts in `log_prob`.
    """

    node: int
    log_prob: float
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

    def lineage(self) -> torch.Tensor:
        """Returns bool [num_nodes, num_nodes]: whether the second is the first or one of its ancestors."""
        lineage = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                lineage[node] |= lineage[parent]
        return lineage


class TreeReader:
    """Makes the inputs of forwards over a tree's nodes, which come behind the context that a KV-cache holds now.

    Args:
        model: the dense model or its twin.
        cache: holds all verified tokens but the last.
        root_position: long [..., 1, 1], the position id of the last verified token.
        attention_mask: long [1, length] of all verified tokens, or `None` without padding.

    Raises:
        `ValueError` for a KV-cache whose layers cannot hold a tree.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache, root_position: torch.Tensor, attention_mask: torch.Tensor | None
    ):
        self.dtype = model.dtype
        self.root_position = root_position
        self.attention_mask = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        self.contexts: dict[str, tuple[int, float]] = {}
        # Windows are the model's, also where the cache was made without its config and keeps everything.
        stock_layers = DynamicCache(config=model.config).layers
        for layer, stock in zip(cache.layers, stock_layers, strict=False):
            if isinstance(layer, DummyLayer):  # which shares the states of another one
                continue
            if type(layer) not in (DynamicLayer, RoomyLayer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"a tree cannot be drafted into a KV-cache with a {type(layer).__name__}: use tree_width=1, or the "
                    "default DynamicCache"
                )
            name = "sliding_attention" if stock.is_sliding else "full_attention"
            self.contexts[name] = (layer.keys.shape[-2], stock.sliding_window if stock.is_sliding else math.inf)

    def inputs(self, tree: Tree, first: int, given: dict) -> dict:
        """Returns the inputs of a forward that reads the nodes from `first` on; those before are in the cache.

        Args:
            given: the inputs that the model's own `prepare_inputs_for_generation` made for verified tokens.
        """
        device = self.root_position.device
        token_ids = torch.tensor([tree.token_ids[first:]], device=device)
        depths = torch.tensor(tree.depths, device=device)
        masks = {name: self._mask(tree, first, depths, *context) for name, context in self.contexts.items()}
        inputs = {
            **given,
            "input_ids": token_ids,
            "position_ids": self.root_position + depths[first:],
            # Several kinds of layers take a mask each, by name.
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
        }
        num_nodes = token_ids.shape[1]
        if inputs.get("logits_to_keep") is not None:
            inputs["logits_to_keep"] = num_nodes
        if (token_types := inputs.get("token_type_ids")) is not None:
            inputs["token_type_ids"] = token_types[:, -1:].expand(-1, num_nodes)
        if inputs.get("cache_position") is not None:  # transformers 5.17
            inputs["cache_position"] = inputs["cache_position"][:1] + torch.arange(num_nodes, device=device)
        return inputs

    def _mask(self, tree: Tree, first: int, depths: torch.Tensor, num_context: int, window: float) -> torch.Tensor:
        """Returns the additive mask, [1, 1, num_read, num_context + num_nodes]."""
        device = depths.device
        distances = depths[first:, None] + torch.arange(num_context, 0, -1, device=device)
        context = distances < window
        if self.attention_mask is not None:
            # The last verified token is the root, and a window holds the last ones of the rest.
            end = self.attention_mask.shape[1] - 1
            context = context & self.attention_mask[:, end - num_context : end].to(device)
        nodes = tree.lineage()[first:].to(device) & (depths[first:, None] - depths < window)
        allowed = torch.cat([context, nodes], dim=-1)[None, None]
        return torch.zeros(allowed.shape, dtype=self.dtype, device=device).masked_fill_(
            ~allowed, torch.finfo(self.dtype).min
        )


def keep_nodes(cache: Cache, num_read: int, kept: torch.Tensor) -> None:
    """Leaves of the nodes that a cache has read last only some, in this order.

    Args:
        num_read: how many nodes the last forward read.
        kept: long [num_kept], which of them to keep.
    """
    for layer in cache.layers:
        if isinstance(layer, DummyLayer):
            continue
        for name in ("keys", "values"):
            states = getattr(layer, name)
            start = states.shape[-2] - num_read
            end = start + len(kept)
            states[..., start:end, :] = states[..., start:, :].index_select(-2, kept.to(states.device))
            setattr(layer, name, states[..., :end, :])
        if layer.is_sliding:
            layer.cumulative_length -= num_read - len(kept)


def keep_rows(outputs, num_read: int, kept: torch.Tensor) -> None:
    """Leaves of what a forward returned for a tree's nodes the rows of some, as if it had read these alone."""

    def rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.index_select(dim, kept.to(tensor.device))

    outputs.logits = rows(outputs.logits, 1)
    if outputs.get("hidden_states") is not None:
        outputs.hidden_states = tuple(rows(states, 1) for states in outputs.hidden_states)
    if outputs.get("attentions") is not None:
        outputs.attentions = tuple(
            None if weights is None
            else torch.cat([rows(weights, 2)[..., :-num_read], rows(rows(weights, 2)[..., -num_read:], 3)], dim=-1)
            for weights in outputs.attentions
        )  # fmt: skip


def best_path(tree: Tree, accepted_children: dict[int, list[int]]) -> list[int]:
    """Returns the longest path of accepted nodes; of several, the likeliest to the draft.

    Args:
        accepted_children: of each accepted node, the root included.
    """
    ends = [0]
    for node in ends:  # grows meanwhile
        ends.extend(accepted_children.get(node, ()))
    return tree.path(max(ends, key=lambda node: (tree.depths[node], tree.log_probs[node])))


@torch.no_grad()
def check_tree(model: PreTrainedModel) -> None:
    """Raises `ValueError` if a model cannot read a tree: its attention takes no mask, or its positions are fixed.

    A branch that is read beside another one must have the logits that it has alone.
    """
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ATTENTIONS:
        raise ValueError(
            f"tree drafting needs an attention that takes a mask, one of {list(ATTENTIONS)}, and this model has "
            f"{attention!r}: load it with attn_implementation='sdpa', or use tree_width=1"
        )
    if "local" in getattr(model.config, "attention_layers", ()):
        raise ValueError(
            f"{type(model).__name__} counts the windows of its local attention by itself, which a tree's nodes would "
            "fill: use tree_width=1"
        )
    context, root, branches = [1, 2, 3], 4, [[5, 6], [7, 8]]
    try:
        with evaluating(model):  # without dropout
            right = _read(model, [*context, root, *branches[1]])[-1]
            wrong = _read(model, [*context, root, *branches[0], *branches[1]])[-1]
            tree = Tree(_token_id(model, root))
            for first, second in branches:
                tree.add(tree.add(0, _token_id(model, first), 0.0), _token_id(model, second), 0.0)
            cache = DynamicCache(config=model.config)
            cache.activate_past_recording()
            _read(model, context, cache)
            position = torch.tensor([[len(context)]], device=execution_device(model))
            reader = TreeReader(model, cache, position, None)
            inputs = reader.inputs(tree, 0, {"past_key_values": cache, "use_cache": True})
            outputs = model(**inputs, return_dict=True)
            found = outputs.logits[0, -1].double()
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot read a tree of drafts ({type(error).__name__}: {error}): use tree_width=1"
        ) from error
    if (found - right).norm() > 0.1 * (wrong - right).norm():
        raise ValueError(
            f"{type(model).__name__} cannot read a tree of drafts, as it takes no mask or no positions of the caller's "
            "(ALiBi, for one, fixes them): use tree_width=1"
        )


def _token_id(model: PreTrainedModel, number: int) -> int:
    size = model.config.get_text_config().vocab_size
    return (size // 2 + number) % size


def _read(model: PreTrainedModel, numbers: Sequence[int], cache: Cache | None = None) -> torch.Tensor:
    """Returns the logits of a sequence of made-up tokens, [length, vocab_size]."""
    input_ids = torch.tensor([[_token_id(model, number) for number in numbers]], device=execution_device(model))
    return model(input_ids, past_key_values=cache, use_cache=cache is not None, return_dict=True).logits[0].double()
