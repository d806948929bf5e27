"""Tokens that cost no forward of a draft: what followed the latest ones where these stood before, in the prompt or in
the output.
"""

import sys

import torch
from transformers import GenerationConfig
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from .proposers import Proposal, WouldStop


NUM_TOKENS = 10  # that are looked up where nobody says how many; transformers' own default
_NGRAM_SIZE = 2  # the same, of the latest tokens that are searched for


class LookupProposer:
    """Proposes what transformers' prompt lookup finds.

    Args:
        generation_config: of the call, whose `prompt_lookup_num_tokens` and `max_matching_ngram_size` are followed.
        would_stop: asked about each token; `None` where the verification asks.
    """

    def __init__(self, generation_config: GenerationConfig, would_stop: WouldStop | None):
        self.generator = PromptLookupCandidateGenerator(
            num_output_tokens=generation_config.prompt_lookup_num_tokens or NUM_TOKENS,
            max_matching_ngram_size=generation_config.max_matching_ngram_size or _NGRAM_SIZE,
            max_length=sys.maxsize,  # `propose` is told how many
        )
        self.would_stop = would_stop

    def propose(self, input_ids: torch.LongTensor, num_tokens: int) -> Proposal | None:
        """Returns up to `num_tokens` tokens behind `input_ids`, long [1, length], which end just before one at which
        the call would stop; `None` where nothing was found.

        They are certain, and not drawn: a sampling call keeps each with the full model's own probability of it.
        """
        start = input_ids.shape[1]
        found_ids, _ = self.generator.get_candidates(input_ids)
        end = min(found_ids.shape[1], start + num_tokens)
        if self.would_stop is not None:
            end = next((i for i in range(start, end) if self.would_stop(found_ids[:, : i + 1], ())), end)
        return Proposal(ids=found_ids[:, start:end], is_lookup=True) if end > start else None
