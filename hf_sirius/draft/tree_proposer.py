"""Proposes a tree of tokens."""

import math
from typing import NamedTuple

import torch

from ..model.compat import stepwise_windows
from ..model.encoder_decoder import text_input
from .cache import CacheView, text_cache, wide_windows
from .proposers import ChainProposer, Proposal
from .tree import Leaf, Tree
from .tree_reading import TreeReader


class _Offer(NamedTuple):
    """How a continuation may go on, if it is among the likeliest of its level."""

    is_chain: bool  # whether this is what a draft without branches would write
    log_prob: float  # the draft's log-probability of the continuation, the token included
    leaf: int  # the node behind which it goes on
    token_id: int | None  # the token; `None` where the continuation is finished


class TreeProposer(ChainProposer):
    """Drafts a tree: several continuations, of which each level is one forward of the twin."""

    def propose(self, input_ids: torch.LongTensor, model_kwargs: dict, num_tokens: int) -> Proposal:
        """Returns a tree of up to `num_tokens` levels behind `input_ids`, long [1, length]."""
        model, cache = self.draft.model, CacheView(text_cache(model_kwargs["past_key_values"]))
        given = {**self.draft.inputs(input_ids, model_kwargs), "past_key_values": model_kwargs["past_key_values"]}
        position = given.get(text_input(model, "position_ids"))
        if position is None:
            position = input_ids.new_tensor([[input_ids.shape[1] - 1]])
        reader = TreeReader(model, cache.cache, position, model_kwargs.get(text_input(model, "attention_mask")))
        tree, num_steps = self._grow(input_ids, num_tokens, cache, reader, given)
        num_drafted = len(tree) - 1
        tree = tree.pruned()
        depth = max(tree.depths)
        path = tree.path_ids(tree.depths.index(depth))
        return Proposal(
            ids=input_ids.new_tensor([path], dtype=torch.long),
            num_steps=num_steps,
            is_cut=depth < min(num_tokens, 1),
            tree=tree,
            reader=reader,
            num_nodes_drafted=num_drafted,
        )

    def _grow(self, input_ids, num_levels: int, cache: CacheView, reader, given: dict) -> tuple[Tree, int]:
        """Returns the drafted tree, the nodes that lead nowhere included, and the number of forwards."""
        width = self.config.tree_width
        tree = Tree(input_ids[0, -1].item())
        ids_of = {0: input_ids}  # the tokens up to each node that is to be read, long [1, length]
        scores_of: dict[int, tuple[torch.Tensor, ...]] = {0: ()}
        chain: int | None = 0  # the last node of what a draft without branches would write, until that is finished
        is_doubtful = False  # whether such a draft would have ended in doubt
        finished: list[_Offer] = []
        unread, first, num_steps = [0], 0, 0
        cache.mark()
        try:
            with (
                self.draft.drafting(),
                wide_windows(cache.cache, width * num_levels + 1),
                stepwise_windows(cache.cache),
            ):
                for _ in range(num_levels):
                    inputs = reader.inputs(tree, first, given)
                    logits = self.draft.forward(inputs).logits
                    first, num_steps = len(tree), num_steps + 1
                    scores = logits[0].to(dtype=torch.float32, device=input_ids.device, copy=True)
                    if self.logits_processor:  # made for a single row, as everywhere in assisted decoding
                        rows = [self.logits_processor(ids_of[leaf], scores[i, None]) for i, leaf in enumerate(unread)]
                        scores = torch.cat(rows)
                    level_scores = dict(zip(unread, scores.split(1), strict=True))
                    offers = finished + self._offers(tree, unread, scores, chain)
                    unread, finished, is_sure = [], [], False
                    # The chain always stays, so that no cycle is worse for its branches.
                    offers.sort(key=lambda offer: (-offer.is_chain, -offer.log_prob))
                    for offer in offers[:width]:
                        leaf, token_id = offer.leaf, offer.token_id
                        if token_id is not None:
                            next_ids = torch.cat([ids_of[leaf], input_ids.new_tensor([[token_id]])], dim=-1)
                            if self.would_stop(next_ids, [*scores_of[leaf], level_scores[leaf]]):
                                token_id = None  # as in a draft without branches, it is the dense model's
                        if token_id is None:
                            finished.append(offer._replace(token_id=None))
                            chain = None if offer.is_chain else chain
                            continue
                        node = tree.add(leaf, token_id, offer.log_prob)
                        ids_of[node] = next_ids
                        scores_of[node] = (*scores_of[leaf], level_scores[leaf]) if self.keeps_scores else ()
                        unread.append(node)
                        is_likely = math.exp(offer.log_prob - tree.log_probs[leaf]) >= self.config.draft_confidence
                        is_sure |= is_likely
                        if offer.is_chain:
                            chain = node
                            tree.likeliest = tree.likeliest if is_doubtful else node
                            is_doubtful |= not is_likely
                    if not unread or not is_sure:
                        break
        finally:
            cache.roll_back(first)
        leaves = [Leaf(offer.leaf, offer.log_prob, is_end=True) for offer in finished]
        leaves += [Leaf(node, tree.log_probs[node], is_end=False) for node in unread]
        tree.leaves = sorted(leaves, key=lambda leaf: -leaf.log_prob)
        return tree, num_steps

    def _offers(self, tree: Tree, leaves: list[int], scores: torch.Tensor, chain: int | None) -> list[_Offer]:
        """Returns the likeliest tokens behind some leaves; scores is float32 [num_leaves, vocab_size], processed."""
        width, offers = self.config.tree_width, []
        # Of equal ones first the token that a draft without branches takes.
        likeliest = scores.argmax(dim=-1, keepdim=True)
        token_ids = torch.cat([likeliest, scores.topk(min(width, scores.shape[-1])).indices], dim=-1)
        log_probs = (scores / self.config.temperature).log_softmax(dim=-1).gather(-1, token_ids)
        for leaf, ids, of_ids in zip(leaves, token_ids.tolist(), log_probs.tolist(), strict=True):
            likely = dict(zip(ids, of_ids, strict=True))
            num_branches = 1 if math.exp(of_ids[0]) >= self.config.branch_cutoff else width
            offers += [
                _Offer(leaf == chain and token_id == ids[0], tree.log_probs[leaf] + log_prob, leaf, token_id)
                for token_id, log_prob in list(likely.items())[:num_branches]
                if log_prob > -math.inf
            ]
            if leaf == chain and not any(offer.is_chain for offer in offers):  # no token is allowed here
                offers.append(_Offer(True, tree.log_probs[leaf], leaf, None))
        return offers
