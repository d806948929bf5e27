"""Tokens that cost no forward of a draft: what followed the latest ones where these stood before, in the prompt or in
the output.
"""

import sys
from collections.abc import Callable

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
        vocab_size: of the model's outputs, which ids that stand for images may be beyond.
    """

    def __init__(self, generation_config: GenerationConfig, would_stop: WouldStop | None, vocab_size: int):
        asked = generation_config.prompt_lookup_num_tokens
        self.num_tokens = NUM_TOKENS if asked is None else asked
        self.generator = PromptLookupCandidateGenerator(
            num_output_tokens=self.num_tokens,
            max_matching_ngram_size=generation_config.max_matching_ngram_size or _NGRAM_SIZE,
            max_length=sys.maxsize,  # `propose` is told how many
        )
        self.would_stop, self.vocab_size = would_stop, vocab_size

    def propose(
        self, input_ids: torch.LongTensor, most: int, choose: Callable[[int], int] = lambda num_found: num_found
    ) -> Proposal | None:
        """Returns up to `most` tokens behind `input_ids`, long [1, length], which end just before one at which the call
        would stop; `None` where nothing was found.

        They are certain, and not drawn: a sampling call keeps each with the full model's own probability of it.

        Args:
            choose: returns how many are proposed of so many that were found, which is at least one.
        """
        start = input_ids.shape[1]
        found_ids, _ = self.generator.get_candidates(input_ids)
        num_found = min(found_ids.shape[1] - start, most)
        if num_found < 1:
            return None
        end = wanted = start + choose(num_found)
        if self.would_stop is not None:
            end = next((i for i in range(start, wanted) if self.would_stop(found_ids[:, : i + 1], ())), wanted)
        unknown = (found_ids[0, start:end] >= self.vocab_size).nonzero()
        if len(unknown):
            end = start + int(unknown[0])
        if end == start:
            return None
        is_cut = end < wanted or end - start == most < found_ids.shape[1] - start
        return Proposal(ids=found_ids[:, start:end], is_lookup=True, is_cut=is_cut)
