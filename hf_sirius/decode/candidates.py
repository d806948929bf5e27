"""The candidate generator that the stock assisted-decoding loop asks for drafts, cycle by cycle. It translates what a
proposer makes for the loop, and notes what the verification says.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
)
from transformers.generation.candidate_generator import CandidateGenerator

from ..draft.cache import CacheView, check_cache, growing, roomy, text_cache
from ..draft.lookup import LookupProposer
from ..draft.proposers import ChainProposer, Proposal, likelihood
from ..draft.states import States, find_recurrence, stop_growing
from ..draft.tree_proposer import TreeProposer
from ..draft.tree_reading import keep_rows
from ..model.compat import IS_5_17, stop_recording
from ..model.encoder_decoder import text_input
from ..model.positions import Positions
from .call import Call
from .checks import check_lengths
from .controller import Controller
from .ending import CallEnd
from .first_forward import mask_of_new_tokens, new_tokens_only, num_tokens_of
from .schedule import Schedule
from .stats import Cycle
from .tree_verification import PathProcessor, Verdict, judge, unread
from .verification import VerificationHook


# Tokens of its text that an encoder-decoder's method sees before it chooses, as the prefill is mostly a single one.
# Until then nothing is drafted.
NUM_OBSERVED = 8


class SiriusCandidateGenerator(CandidateGenerator):
    """Hands the loop what the draft proposes.

    Args:
        call: the state of the running `generate` call.
        generation_config: the call's prepared configuration, which is its own copy.
        logits_processor: the call's own list. Appended to it are the verification hook, if drafts may be kept that the
            dense model would not have written, and a look at the scores, where the call keeps them.
    """

    requires_model_outputs = True  # so that the loop hands over its model_kwargs, with the KV-cache
    model_kwargs_overrides: dict = {}

    def __init__(self, call: Call, generation_config: GenerationConfig, logits_processor: LogitsProcessorList):
        self.call = call
        self.config = call.draft.config
        self.do_sample = generation_config.do_sample
        self.generation_config = generation_config
        self.max_length = generation_config.max_length
        self._device = call.model.device
        self.positions = Positions(call.model.config.get_text_config())
        self.logits_processor = LogitsProcessorList(logits_processor)
        self.end = CallEnd(call.stopping_criteria, generation_config)
        if self.end.keeps_scores:
            logits_processor.append(self.end)
        self.hook: VerificationHook | None = None
        if self.config.threshold < 1.0:
            self.hook = VerificationHook(self.config.threshold, self.config.temperature, self.do_sample)
            logits_processor.append(self.hook)
        self.path: PathProcessor | None = None
        if self.config.tree_width > 1:
            self.path = PathProcessor(LogitsProcessorList(logits_processor))
            logits_processor[:] = [self.path]
        self.controller: Controller | Schedule | None = None
        if self.config.kernel_size == "auto":
            self.controller = Controller(call.model, self.config)
        elif not isinstance(self.config.kernel_size, int):
            self.controller = Schedule(self.config.kernel_size)
        proposer_class = ChainProposer if self.path is None else TreeProposer
        self.proposer = proposer_class(
            call.draft,
            self.logits_processor,
            self.end.would_stop,
            self.do_sample,
            self.end.keeps_scores,
            self.controller and self.controller.goes_on,
        )
        self.lookup = self._lookup(generation_config)
        self.proposal: Proposal | None = None  # what is being verified
        is_early = call.model.config.is_encoder_decoder and call.draft.method.needs_prefill()
        self._num_unobserved = NUM_OBSERVED if is_early else 0  # tokens that the method is still to see
        self._is_selected = False
        self.verdict: Verdict | None = None  # about its tree
        self._is_cut = False  # whether the length cut the draft short
        self.recurrence = find_recurrence(call.model)
        self.states: States | None = None  # of recurrent layers, while a draft is verified
        self._draft_seconds = self._verification_start = 0.0
        self._kernel_size = 1  # tokens of the running cycle

    def _lookup(self, generation_config: GenerationConfig) -> LookupProposer | None:
        """Returns what looks tokens up: where the user asks for it; and where the number of tokens is chosen, if the
        output does not depend on it, as what is repeated is likely enough for a threshold below 1.
        """
        asked = generation_config.prompt_lookup_num_tokens
        is_tree = self.config.tree_width > 1
        if asked and is_tree:
            raise ValueError(
                f"prompt_lookup_num_tokens={asked} came with a twin of "
                f"tree_width={self.config.tree_width}: what is looked up has no branches. Leave one of the two out"
            )
        if isinstance(self.controller, Schedule):
            is_wanted = min(self.controller.kernel_sizes) < 0 and not is_tree
        else:
            is_free = self.controller is not None and self.config.threshold == 1.0 and not is_tree
            is_wanted = asked is not None or is_free
        if asked == 0 or not is_wanted:
            return None
        would_stop = None if self.end.keeps_scores else self.end.would_stop
        return LookupProposer(generation_config, would_stop, self.call.model.config.get_text_config().vocab_size)

    def get_candidates(
        self, input_ids: torch.LongTensor, model_kwargs: dict, is_first_iteration: bool, **kwargs
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Returns the verified tokens, long [1, length], with the draft behind them, and where it was sampled its
        processed logits, float32 [1, num_drafted, vocab_size]. Before the prompt is read there is no draft.
        """
        self.call.is_verifying = True
        cache = text_cache(model_kwargs["past_key_values"])
        if is_first_iteration:
            check_cache(cache)
            check_lengths(input_ids, model_kwargs, text_input(self.call.model, "attention_mask"))
            if IS_5_17:
                self.call.undo.callback(stop_recording, cache)
            if self.recurrence is not None:
                self.call.undo.callback(stop_growing, cache)
            mask_length = getattr(self.generation_config, "_mask_length", None)
            self._num_unobserved -= input_ids.shape[1]
            mask = mask_of_new_tokens(self.call.model, model_kwargs)
            self._take_next_forward(
                self.call.draft.observing(mask, takes_weights=self._num_unobserved <= 0),
                new_tokens_only(self.call.model, input_ids, model_kwargs, mask_length),
            )
            return input_ids, None
        # The prefill has made the cache's layers, if they were not there. Compiled code takes the stock ones alone.
        if self.proposal is None and not self.call.draft.is_model_compiled:
            self.call.undo.enter_context(roomy(cache))
        # The last token before `max_length` is the dense model's.
        most = min(self.max_length - input_ids.shape[1] - 1, self.positions.most_drafted(model_kwargs, cache))
        start = time.perf_counter()
        self.proposal = self._looked_up(input_ids, most)
        self._draft_seconds, self._is_cut = time.perf_counter() - start, False
        if self.proposal is None:
            self.proposal = self._drafted(input_ids, model_kwargs, most)
        else:
            self._kernel_size = 1 + self.proposal.ids.shape[1]
        proposal = self.proposal
        if self.recurrence is not None:
            self.states = States(self.call.model, cache, self.recurrence) if proposal.ids.shape[1] else None
        # On the device to which the loop would move it, which would make another tensor of it.
        candidate_ids = torch.cat([input_ids, proposal.ids], dim=-1).to(self._device)
        if proposal.ends_output:
            self.end.put_at(candidate_ids.shape[1])
        observed = contextlib.nullcontext()
        if self._num_unobserved > 0:
            self._num_unobserved -= 1 + proposal.ids.shape[1]
            observed = self.call.draft.observing(None, takes_weights=self._num_unobserved <= 0)
        elif self.config.reselect_every is not None:
            observed = self.call.draft.observing(None, takes_weights=self._reselects())
        if self.path is None or not proposal.ids.shape[1]:
            self._take_next_forward(observed)
        else:
            self._take_next_forward(
                observed,
                lambda inputs: proposal.reader.inputs(proposal.tree, 0, inputs),
                lambda outputs: self._judge_tree(outputs, candidate_ids, cache),
            )
        if self.path is not None:
            self.path.end, self.verdict = float("inf"), unread(proposal)
        self.end.arm(candidate_ids)
        if self.hook is not None:
            self.hook.arm(candidate_ids, start=input_ids.shape[1])
        self._verification_start = time.perf_counter() - self.call.draft.compile_seconds
        return candidate_ids, proposal.scores

    def _looked_up(self, input_ids: torch.LongTensor, most: int) -> Proposal | None:
        """Returns up to `most` tokens that stood behind the latest ones before, if they are worth a verification."""
        if self.lookup is None or most < 1 or not (self.controller is None or self.controller.looks_up()):
            return None
        if self.controller is None:
            return self.lookup.propose(input_ids, most)
        num_sought = self.lookup.num_tokens
        return self.lookup.propose(input_ids, most, lambda found: self.controller.num_looked_up(found, num_sought))

    def _drafted(self, input_ids: torch.LongTensor, model_kwargs: dict, most: int) -> Proposal:
        """Returns what the twin drafts, of at most so many tokens."""
        if self._num_unobserved > 0:
            wanted = 0
        elif self.controller is None:
            wanted = self.config.kernel_size - 1
        else:
            wanted = self.controller.num_tokens(most)
        if wanted and not self._is_selected:
            self._select()
        start = time.perf_counter() - self.call.draft.compile_seconds
        if wanted or self.path is not None:
            proposal = self.proposer.propose(input_ids, model_kwargs, min(wanted, most))
        else:
            proposal = Proposal(ids=input_ids[:, :0])
        self._draft_seconds = time.perf_counter() - self.call.draft.compile_seconds - start
        self._is_cut, self._kernel_size = most < wanted, 1 + proposal.num_steps
        return proposal

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Takes note of a verification that accepted `num_matches` tokens, and takes the hook's lifts out of its
        processed logits, `scores`, float32 [1, num_drafted + 1, vocab_size].
        """
        now, num_matches = time.perf_counter(), int(num_matches)
        num_reread, state_seconds = 0, 0.0
        if self.states is not None:
            with self.call.draft.verifying(num_matches + 1):
                num_reread = self.states.keep(num_matches + 1)
            self.states, state_seconds = None, time.perf_counter() - now
        if self.hook is not None:
            self.hook.restore(scores)
        self.end.reached(scores, num_matches)
        self.call.is_verifying = False
        self.generation_config.max_length = self.max_length
        bonus_id = input_ids[0, -1].item()
        (bonus_likelihood,) = self._likelihoods(input_ids[:, -1:], scores[:, num_matches, None])
        if self.proposal is None:
            self.call.stats.record_first(bonus_id, bonus_likelihood)
            if self.controller is None and self._num_unobserved <= 0:
                self._select()
            return
        if self._is_selected and self._reselects():
            self.call.draft.select()
        is_cut, branches = self._is_cut or self.proposal.is_cut, self.verdict and self.verdict.branches
        if branches is None:
            drafted_ids = tuple(self.proposal.ids[0].tolist())
            likelihoods = self._likelihoods(self.proposal.ids, scores[:, :-1])
        else:
            drafted_ids = branches.leaf_ids[branches.winner]
            likelihoods = branches.leaf_likelihoods[branches.winner]
            is_cut |= self.proposal.tree.leaves[branches.winner].is_end
        cycle = Cycle(
            drafted_ids=drafted_ids,
            num_accepted=num_matches,
            num_agreed=self._num_agreed(input_ids, scores, num_matches),
            bonus_id=bonus_id,
            is_full=not is_cut,
            likelihoods=likelihoods,
            bonus_likelihood=bonus_likelihood,
            num_steps=self.proposal.num_steps,
            num_compiled_steps=self.proposal.num_steps if self.call.draft.is_compiled else 0,
            kernel_size=self._kernel_size,
            is_lookup=self.proposal.is_lookup,
            draft_seconds=self._draft_seconds,
            verification_seconds=now - self.call.draft.compile_seconds - self._verification_start,
            is_verification_compiled=self.call.draft.is_verification_compiled,
            num_reread=num_reread,
            state_seconds=state_seconds,
            branches=branches,
        )
        self.call.stats.record_cycle(cycle)
        self.call.stats.not_compiled = self.call.draft.not_compiled
        if self.controller is not None:
            self.controller.note(cycle, self.proposal.margins)
            self.call.stats.reason = self.controller.reason

    def _select(self) -> None:
        """Chooses neurons from what was observed, and gathers them; where drafts may never come, before the first."""
        self._is_selected, start = True, time.perf_counter()
        self.call.draft.select()
        seconds = time.perf_counter() - start
        self.call.stats.record_selection(seconds)
        if self.controller is not None:
            self.controller.note_selection(seconds)

    def _likelihoods(self, token_ids: torch.LongTensor, scores: torch.Tensor) -> tuple[float, ...]:
        """Returns the full model's likelihood of each token, [1, num_tokens], by its scores at their places."""
        if not token_ids.shape[1]:
            return ()
        return tuple(likelihood(token_ids.to(scores.device), scores, self.config.temperature)[0].tolist())

    def _num_agreed(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> int:
        """Returns how many of the accepted tokens are the full model's argmax."""
        if not num_matches:
            return 0
        accepted_ids = input_ids[0, -num_matches - 1 : -1].to(scores.device)
        return (scores[0, :num_matches].argmax(dim=-1) == accepted_ids).sum().item()

    def _reselects(self) -> bool:
        """Whether the neurons are chosen anew after the running cycle."""
        every = self.config.reselect_every
        return every is not None and (self.call.stats.num_cycles + 1) % every == 0

    def _take_next_forward(
        self,
        observed: contextlib.AbstractContextManager,
        prepare: Callable[[dict], dict] = lambda inputs: inputs,
        finish: Callable[[Any], None] = lambda outputs: None,
    ) -> None:
        """Has the loop's next forward, and no later one, such as a processor may make, run within `observed` on what
        `prepare` makes of its inputs, and `finish` see the outputs.
        """

        def read(forward: Callable[..., Any], **inputs: Any) -> Any:
            inputs = prepare(inputs)
            cache = inputs.get("past_key_values")  # which Phi-3 drops once
            num_tokens = num_tokens_of(self.call.model, inputs)
            grown = contextlib.nullcontext() if cache is None else growing(text_cache(cache), num_tokens)
            kept = contextlib.nullcontext() if self.states is None else self.states.reading(num_tokens)
            # A graph has no place for an observer, and the prompt comes in any length.
            is_watched = not isinstance(observed, contextlib.nullcontext)
            with observed, grown, kept:
                outputs = self.call.draft.read(forward, inputs, num_tokens, is_watched)
            if outputs.get("past_key_values") is None:
                raise ValueError(
                    f"{type(self.call.model).__name__} hands out no KV-cache, without which drafts cannot be verified: "
                    "set use_cache, and of a decoder in an encoder-decoder is_decoder, in its config"
                )
            finish(outputs)
            return outputs

        self.call.next_forward = read

    def _judge_tree(self, outputs: Any, candidate_ids: torch.LongTensor, cache: Cache) -> None:
        """Leaves of a tree's verification the path that wins, as if it alone had been proposed and read.

        The stock loop compares, and keeps, the very tensor that it was handed: the path is written into it. Behind one
        that ends early comes a token that is not the dense model's own, at which the loop stops.
        """
        tree, depth = self.proposal.tree, self.proposal.ids.shape[1]
        verified_ids = candidate_ids[:, :-depth]
        self.verdict = judge(self.proposal, verified_ids, outputs.logits, self.logits_processor, self.config)
        path, padding = self.verdict.path, [0] * (depth - len(self.verdict.path))
        kept_ids = [*(tree.token_ids[node] for node in path), *(self.verdict.rejecting_id for _ in padding)]
        candidate_ids[:, -depth:] = candidate_ids.new_tensor([kept_ids])
        kept = torch.tensor([0, *path, *padding], device=candidate_ids.device)
        CacheView(cache).keep(len(tree), kept)
        keep_rows(outputs, len(tree), kept)
        self.path.end = verified_ids.shape[1] + len(path)
        if self.hook is not None:
            self.hook.shorten(self.path.end)
