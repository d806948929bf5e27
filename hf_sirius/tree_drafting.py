"""The candidate generator of trees."""

import contextlib
import dataclasses
import math
from typing import NamedTuple

import torch
from transformers import Cache, LogitsProcessorList

from .cache import layer_lengths, roll_back, wide_windows
from .call import Call
from .compat import stepwise_windows
from .drafting import SiriusCandidateGenerator
from .stats import Branches
from .tree import Leaf, Tree, TreeReader, best_path, keep_nodes, keep_rows
from .verification import is_accepted


class _Offer(NamedTuple):
    """How a continuation may go on, if it is among the likeliest of its level.

    Attributes:
        is_chain: whether this is what a draft without branches would write.
        log_prob: the draft's log-probability of the continuation, the token included.
        leaf: the node behind which it goes on.
        token_id: the token; `None` where the continuation is finished.
    """

    is_chain: bool
    log_prob: float
    leaf: int
    token_id: int | None


class TreeCandidateGenerator(SiriusCandidateGenerator):
    """Drafts a tree: each level is one forward of the twin, and the verification reads the whole tree in one.

    The stock loop compares, and keeps, the very tensor that it was handed. So it is handed a path of the tree's depth;
    hooks on the dense model turn the verification into one of the tree, and then write the path that won into that
    tensor, and leave its logits and its states alone. After a path that ends early comes a token that is not the dense
    model's own, at which the loop stops.
    """

    def __init__(self, twin, call, generation_config, logits_processor):
        super().__init__(twin, call, generation_config, logits_processor)
        self._verifying_processors = LogitsProcessorList(logits_processor)
        logits_processor[:] = [self._process_path]
        self._path_end = math.inf

    def _process_path(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Leaves the scores behind the path that won alone: no prefix of theirs was drafted, and a processor may know
        of none of them.
        """
        return scores if input_ids.shape[1] > self._path_end else self._verifying_processors(input_ids, scores)

    def _draft(self, input_ids: torch.LongTensor, model_kwargs: dict) -> tuple[torch.LongTensor, list[torch.Tensor]]:
        self._path_end = math.inf
        num_levels = min(self.config.kernel_size - 1, self.max_length - input_ids.shape[1] - 1)
        self._is_cut = num_levels < self.config.kernel_size - 1
        cache = model_kwargs["past_key_values"]
        given = self.twin.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, is_first_iteration=False, **model_kwargs
        )
        position = given.get("position_ids")
        if position is None:
            position = input_ids.new_tensor([[input_ids.shape[1] - 1]])
        reader = TreeReader(self.call.model, cache, position, model_kwargs.get("attention_mask"))
        tree = self._grow(input_ids, num_levels, cache, reader, given)
        num_drafted = len(tree) - 1
        tree = tree.pruned()
        depth = max(tree.depths)
        path = tree.path_ids(tree.depths.index(depth))
        # On the device to which the loop would move it, which would make another tensor of it.
        candidate_ids = torch.cat([input_ids, input_ids.new_tensor([path])], dim=-1).to(self.call.model.device)
        leaf_ids = tuple(tree.path_ids(leaf.node) for leaf in tree.leaves)
        self._branches = Branches(
            leaf_ids=leaf_ids,
            leaf_likelihoods=tuple((None,) * len(ids) for ids in leaf_ids),
            winner=0,
            num_nodes_drafted=num_drafted,
            num_nodes_verified=0,
            likeliest_advance_length=1,
        )
        self._is_cut |= not depth
        if depth:
            self._observed.enter_context(self._verifying(tree, reader, cache, candidate_ids))
        return candidate_ids, []

    def _grow(self, input_ids, num_levels, cache, reader, given) -> Tree:
        """Returns the drafted tree, the nodes that lead nowhere included."""
        width = self.config.tree_width
        tree = Tree(input_ids[0, -1].item())
        scores_of: dict[int, tuple[torch.Tensor, ...]] = {0: ()}
        chain: int | None = 0  # the last node of what a draft without branches would write, until that is finished
        is_doubtful = False  # whether such a draft would have ended in doubt
        finished: list[_Offer] = []
        unread, first, lengths_before = [0], 0, layer_lengths(cache)
        try:
            with (
                self.call.method.drafting(),
                wide_windows(cache, width * num_levels + 1),
                stepwise_windows(cache),
            ):
                for _ in range(num_levels):
                    inputs = reader.inputs(tree, first, {**given, "past_key_values": cache})
                    logits = self._forward_twin(inputs).logits
                    first = len(tree)
                    offers, level_scores = list(finished), {}
                    for i, leaf in enumerate(unread):
                        scores = logits[:, i].to(dtype=torch.float32, device=input_ids.device, copy=True)
                        scores = self.logits_processor(self._ids_at(input_ids, tree, leaf), scores)
                        level_scores[leaf] = scores
                        offers += self._offers(leaf, tree.log_probs[leaf], scores[0], is_chain=leaf == chain)
                    unread, finished, is_sure = [], [], False
                    # The chain always stays, so that no cycle is worse for its branches.
                    offers.sort(key=lambda offer: (-offer.is_chain, -offer.log_prob))
                    for offer in offers[:width]:
                        leaf, token_id = offer.leaf, offer.token_id
                        if token_id is not None:
                            leaf_ids = self._ids_at(input_ids, tree, leaf)
                            next_ids = torch.cat([leaf_ids, leaf_ids.new_tensor([[token_id]])], dim=-1)
                            if self._would_stop(next_ids, [*scores_of[leaf]], level_scores[leaf]):
                                token_id = None  # as in a draft without branches, it is the dense model's
                        if token_id is None:
                            finished.append(offer._replace(token_id=None))
                            chain = None if offer.is_chain else chain
                            continue
                        node = tree.add(leaf, token_id, offer.log_prob)
                        scores_of[node] = (*scores_of[leaf], level_scores[leaf]) if self._scores is not None else ()
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
            roll_back(cache, lengths_before, first)
        leaves = [Leaf(offer.leaf, offer.log_prob, is_end=True) for offer in finished]
        leaves += [Leaf(node, tree.log_probs[node], is_end=False) for node in unread]
        tree.leaves = sorted(leaves, key=lambda leaf: -leaf.log_prob)
        return tree

    def _offers(self, leaf: int, leaf_log_prob: float, scores: torch.Tensor, is_chain: bool) -> list[_Offer]:
        """Returns the likeliest tokens behind a leaf; scores is float32 [vocab_size], processed."""
        likeliest = scores.argmax().item()  # of equal ones, the token that a draft without branches takes
        log_probs = (scores / self.config.temperature).log_softmax(dim=-1)
        token_ids = [likeliest]
        if not log_probs[likeliest].exp() >= self.config.branch_cutoff:
            width = self.config.tree_width
            others = scores.topk(min(width, len(scores))).indices.tolist()
            token_ids = list(dict.fromkeys([likeliest, *others]))[:width]
        offers = [
            _Offer(is_chain and token_id == likeliest, leaf_log_prob + log_prob, leaf, token_id)
            for token_id, log_prob in zip(token_ids, log_probs[token_ids].tolist(), strict=True)
            if log_prob > -math.inf
        ]
        if is_chain and not any(offer.is_chain for offer in offers):  # no token is allowed here
            offers.append(_Offer(True, leaf_log_prob, leaf, None))
        return offers

    @contextlib.contextmanager
    def _verifying(self, tree: Tree, reader: TreeReader, cache: Cache, candidate_ids: torch.LongTensor):
        """Within the block, the dense model's next forward in this context reads the tree, and leaves the path that
        wins.
        """
        model, depth = self.call.model, max(tree.depths)
        verified_ids = candidate_ids[:, : candidate_ids.shape[1] - depth]

        def read_tree(module, args, inputs):
            if Call.current() is self.call:
                inputs = reader.inputs(tree, 0, inputs)
            return args, inputs

        def keep_best(module, args, outputs):
            if Call.current() is not self.call:
                return
            undo.close()  # before the processors, which may make forwards of their own
            path, rejecting_scores, likelihoods = self._judge(tree, verified_ids, outputs.logits)
            kept_ids = [tree.token_ids[node] for node in path]
            # Not what the dense model is about to choose.
            kept_ids += [(rejecting_scores.argmax().item() + 1) % rejecting_scores.shape[-1]] * (depth - len(path))
            candidate_ids[:, verified_ids.shape[1] :] = candidate_ids.new_tensor([kept_ids])
            kept = torch.tensor([0, *path, *[0] * (depth - len(path))], device=candidate_ids.device)
            keep_nodes(cache, len(tree), kept)
            keep_rows(outputs, len(tree), kept)
            self._path_end = verified_ids.shape[1] + len(path)
            if self.hook is not None:
                self.hook.shorten(self._path_end)
            self._note_winner(tree, path, likelihoods)

        with contextlib.ExitStack() as undo:
            undo.callback(model.register_forward_pre_hook(read_tree, with_kwargs=True).remove)
            undo.callback(model.register_forward_hook(keep_best).remove)
            yield

    def _judge(
        self, tree: Tree, verified_ids: torch.LongTensor, logits: torch.Tensor
    ) -> tuple[list[int], torch.Tensor, dict[int, float]]:
        """Returns the path that wins, the dense model's processed logits behind it, float32 [1, vocab_size], and its
        likelihood of the nodes whose parents it accepts.

        Args:
            logits: [1, num_nodes, vocab_size], the dense model's at each node.
        """

        def scores_at(node: int) -> torch.Tensor:
            scores = logits[:, node].to(dtype=torch.float32, device=verified_ids.device, copy=True)
            return self.logits_processor(self._ids_at(verified_ids, tree, node), scores)

        reached, accepted, likelihoods = [0], {}, {}
        for node in reached:  # grows meanwhile
            if not (children := tree.children(node)):
                continue
            token_ids = verified_ids.new_tensor([tree.token_ids[child] for child in children])
            scores = scores_at(node).expand(len(children), -1)
            is_kept = is_accepted(token_ids, scores, self.config.threshold, self.config.temperature)
            likelihoods.update(zip(children, self._likelihoods(token_ids[None], scores[None]), strict=True))
            accepted[node] = [child for child, kept in zip(children, is_kept.tolist(), strict=True) if kept]
            reached += accepted[node]
        path = best_path(tree, accepted)
        self._likeliest_advance = tree.likeliest_length(accepted) + 1
        return path, scores_at(path[-1] if path else 0), likelihoods

    def _note_winner(self, tree: Tree, path: list[int], likelihoods: dict[int, float]) -> None:
        winner = next(i for i, leaf in enumerate(tree.leaves) if tree.path(leaf.node)[: len(path)] == path)
        leaf = tree.leaves[winner]
        self._is_cut |= leaf.is_end
        self._drafted_ids = self._candidate_ids.new_tensor([tree.path_ids(leaf.node)])
        self._branches = dataclasses.replace(
            self._branches,
            leaf_likelihoods=tuple(tuple(map(likelihoods.get, tree.path(leaf.node))) for leaf in tree.leaves),
            winner=winner,
            num_nodes_verified=len(tree) - 1,
            likeliest_advance_length=self._likeliest_advance,
        )

    def _ids_at(self, input_ids: torch.LongTensor, tree: Tree, node: int) -> torch.LongTensor:
        return torch.cat([input_ids, input_ids.new_tensor([tree.path_ids(node)], dtype=torch.long)], dim=-1)
