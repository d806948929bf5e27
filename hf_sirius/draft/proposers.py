"""What proposes tokens. A proposer makes a [`Proposal`], and `decode/candidates.py` hands it to the loop."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessorList

from ..model.compat import stepwise_windows
from .cache import CacheView, text_cache
from .draft import Draft
from .tree import Tree
from .tree_reading import TreeReader


# Whether the call would stop at the last of these tokens, long [1, length], given the scores of those drafted.
WouldStop = Callable[[torch.LongTensor, Sequence[torch.Tensor]], bool]


@dataclasses.dataclass
class Proposal:
    """Tokens that a verification reads."""

    # long [num_rows, num_proposed], behind the verified ones; a row is a sequence. Of a tree its deepest path
    ids: torch.LongTensor
    num_steps: int = 0  # forwards of the draft that wrote them
    # by how many nats the draft preferred each of a chain to all other tokens, where that is asked for
    margins: Sequence[float] = ()
    # the draft's processed logits of each, float32 [num_rows, num_proposed, vocab_size], where it sampled
    scores: torch.Tensor | None = None
    is_lookup: bool = False  # whether no draft wrote them
    is_cut: bool = False  # whether EOS or a criterion ended it before its time
    ends_output: bool = False  # whether the call ends with the last of them, should it be kept
    tree: Tree | None = None  # all that was drafted, where that is more than `ids`, and how to read it
    reader: TreeReader | None = None
    num_nodes_drafted: int = 0


def likelihood(token_ids: torch.Tensor, scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns softmax(scores / temperature)[token] (paper, section 4.1).

    Args:
        token_ids: long [...].
        scores: float [..., vocab_size], processed logits at the tokens' places.
        temperature: greater than 0.

    Returns:
        float [...].
    """
    return (scores / temperature).softmax(dim=-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def _margin(token_ids: torch.LongTensor, scores: torch.Tensor) -> float:
    """Returns by how much the score of a token, long [1, 1], is above all others, float32 [1, vocab_size]."""
    others = scores.scatter(-1, token_ids, -torch.inf).max()  # in a fraction of the time of `topk`
    return (scores.gather(-1, token_ids) - others).item()


class ChainProposer:
    """Lets the twin write one continuation into the dense model's KV-cache, and takes it back for the verification.

    Args:
        draft: of the running call.
        logits_processor: the call's own.
        would_stop: asked about each token.
        do_sample: whether tokens are drawn.
        keeps_scores: whether `would_stop` reads the scores.
        goes_on: asked behind each token of a chain whether there is to be another one, given their margins.
    """

    def __init__(
        self,
        draft: Draft,
        logits_processor: LogitsProcessorList,
        would_stop: WouldStop,
        do_sample: bool,
        keeps_scores: bool,
        goes_on: Callable[[Sequence[float]], bool] | None = None,
    ):
        self.draft = draft
        self.config = draft.config
        self.logits_processor = logits_processor
        self.would_stop = would_stop
        self.do_sample = do_sample
        self.keeps_scores = keeps_scores
        self.goes_on = goes_on

    def propose(self, input_ids: torch.LongTensor, model_kwargs: dict, num_tokens: int) -> Proposal:
        """Returns up to `num_tokens` tokens behind `input_ids`, long [1, length].

        A greedy draft ends just before a token at which the call would stop (EOS, any criterion): that token is then
        the dense model's own. A sampled draft ends with it, as leaving out what was drawn would skew the distribution.
        """
        start = input_ids.shape[1]
        all_scores: list[torch.Tensor] = []
        margins: list[float] = []
        confidence = self.config.draft_confidence
        num_steps, stops = 0, False
        cache = CacheView(text_cache(model_kwargs["past_key_values"]))
        cache.mark()
        try:
            with (
                stepwise_windows(cache.cache),
                self.draft.chain(input_ids, model_kwargs, num_tokens) as next_logits,
            ):
                for _ in range(num_tokens):
                    logits = next_logits(input_ids)
                    if logits is None:
                        break
                    num_steps += 1
                    logits = logits.to(dtype=torch.float32, device=input_ids.device, copy=True)
                    scores = self.logits_processor(input_ids, logits)
                    if not scores.max().isfinite():  # such as a draft in float16 whose activations overflow
                        break
                    if self.do_sample:
                        next_ids = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
                    else:
                        next_ids = scores.argmax(dim=-1, keepdim=True)
                    next_input_ids = torch.cat([input_ids, next_ids], dim=-1)
                    stops = self.would_stop(next_input_ids, [*all_scores, scores])
                    if stops and not self.do_sample:
                        break
                    input_ids = next_input_ids
                    all_scores.append(scores)
                    if stops:
                        break
                    if self.goes_on is not None:
                        margins.append(_margin(next_ids, scores))
                    # Ends with the doubtful token, as leaving out what was drawn would skew the distribution.
                    if confidence and likelihood(next_ids[0], scores, self.config.temperature).item() < confidence:
                        break
                    if margins and not self.goes_on(margins):
                        break
        finally:
            cache.roll_back(num_steps)
        return Proposal(
            ids=input_ids[:, start:],
            num_steps=num_steps,
            margins=margins,
            scores=torch.stack(all_scores, dim=1) if self.do_sample and all_scores else None,
            is_cut=stops,
            ends_output=stops and self.do_sample,
        )
