"""Where a call ends, asked about tokens that are not verified yet."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteriaList


class CallEnd(LogitsProcessor):
    """Where a call ends: asks its criteria about candidates. These may read the scores so far, where the call keeps
    them; then the dense model's decide, which this sees as the last of the processors.
    """

    def __init__(self, stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig):
        self.stopping_criteria = stopping_criteria
        self.generation_config = generation_config
        self.keeps_scores = bool(generation_config.return_dict_in_generate and generation_config.output_scores)
        self._scores: tuple[torch.Tensor, ...] = ()  # of each verified token, float32 [1, vocab_size]
        self._candidate_ids: torch.Tensor | None = None
        self._with_candidates = self._scores

    def would_stop(self, input_ids: torch.LongTensor, draft_scores: Sequence[torch.Tensor]) -> bool:
        """Whether the call would stop at the last of these tokens, long [1, length]."""
        seen = (*self._scores, *draft_scores) if self.keeps_scores else None
        return bool(self.stopping_criteria(input_ids, seen).all())

    def put_at(self, length: int) -> None:
        """Has the loop drop what this verification adds beyond a length: it trims at the length, not at criteria."""
        self.generation_config.max_length = min(self.generation_config.max_length, length)

    def arm(self, candidate_ids: torch.LongTensor) -> None:
        """Expects the verification of `candidate_ids`, long [1, length]."""
        self._candidate_ids, self._with_candidates = candidate_ids, self._scores

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1] + 1
        if self._candidate_ids is not None and length <= self._candidate_ids.shape[1]:
            self._with_candidates = (*self._with_candidates, scores.clone())
            if self.stopping_criteria(self._candidate_ids[:, :length], self._with_candidates).all():
                self.put_at(length)
        return scores

    def reached(self, scores: torch.Tensor, num_matches: int) -> None:
        """Takes note of the scores of a verification's tokens, the bonus token included."""
        if self.keeps_scores:
            self._scores += tuple(scores[:, i] for i in range(num_matches + 1))
