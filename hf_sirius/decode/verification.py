"""The acceptance rule, and the hook through which the stock loop obeys it."""

import torch
from transformers import LogitsProcessor

from ..draft.proposers import likelihood


def is_accepted(
    candidate_ids: torch.Tensor, scores: torch.Tensor, threshold: float, temperature: float, do_sample: bool = False
) -> torch.Tensor:
    """Tells which drafted tokens are kept for the full model's opinion of them (paper, section 4.1).

    A token is kept if it is the argmax of the full model's processed logits l, or if softmax(l / temperature)[token]
    >= threshold and no processor forbids it. `threshold=1.0` keeps the argmax alone. When sampling, the argmax has no
    privilege: what the likelihood does not keep is left to speculative sampling, so that at `threshold=1.0` the full
    model's distribution stays as it is.

    Args:
        candidate_ids: long [...].
        scores: float [..., vocab_size], the full model's processed logits at the candidates' places.
        threshold: likelihood in [0, 1].
        temperature: greater than 0.
        do_sample: whether tokens are sampled.

    Returns:
        bool [...].
    """
    likely = torch.zeros_like(candidate_ids, dtype=torch.bool)
    if threshold < 1.0:
        likely = likelihood(candidate_ids, scores, temperature) >= threshold
        # At a threshold of 0 neither is what a processor forbids.
        likely &= scores.gather(-1, candidate_ids.unsqueeze(-1)).squeeze(-1) > torch.finfo(scores.dtype).min
    return likely if do_sample else likely | (candidate_ids == scores.argmax(dim=-1))


class VerificationHook(LogitsProcessor):
    """Lifts an accepted candidate over all other tokens, so that the stock loop's own comparison keeps it.

    It stands last in the call's list of processors, and so sees the processed logits. `restore` takes the lifts back,
    so that the scores that `generate` returns are the full model's.
    """

    def __init__(self, threshold: float, temperature: float, do_sample: bool):
        self.threshold = threshold
        self.temperature = temperature
        self.do_sample = do_sample
        self._candidate_ids: torch.Tensor | None = None
        self._start = self._end = 0
        self._originals: list[torch.Tensor] = []

    def arm(self, candidate_ids: torch.Tensor, start: int) -> None:
        """Expects a verification of `candidate_ids` (long [1, length]) whose tokens from position `start` on are
        drafted.
        """
        self._candidate_ids = candidate_ids
        self._start, self._end = start, candidate_ids.shape[1]
        self._originals = []

    def shorten(self, end: int) -> None:
        """Expects no drafted token from position `end` on."""
        self._end = end

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1]
        if self._candidate_ids is None or position >= self._end:
            return scores  # the bonus token's place
        candidate = self._candidate_ids[:, position].to(scores.device)
        accepted = is_accepted(candidate, scores, self.threshold, self.temperature, self.do_sample)
        original = scores.gather(-1, candidate.unsqueeze(-1))
        self._originals.append(original)
        # The gap makes the token's softmax 1: sampling then accepts it for certain.
        lifted = scores.max(dim=-1, keepdim=True).values + 100.0
        return scores.scatter(-1, candidate.unsqueeze(-1), torch.where(accepted.unsqueeze(-1), lifted, original))

    def restore(self, scores: torch.Tensor) -> None:
        """Takes the lifts of the last verification back, in place; scores is [1, num_candidates + 1, vocab_size]."""
        for i, original in enumerate(self._originals):
            candidate = self._candidate_ids[:, self._start + i, None].to(scores.device)
            scores[:, i].scatter_(-1, candidate, original.to(scores))  # which processors may have made of another dtype
        self._candidate_ids = None
        self._originals = []
