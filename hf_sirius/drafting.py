"""The candidate generator that the stock assisted-decoding loop asks for drafts, cycle by cycle."""

import contextlib

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator

from .cache import layer_lengths, roll_back, roomy
from .call import Call
from .compat import IS_5_17, stepwise_windows, stop_recording
from .stats import Branches, Cycle
from .twin import SparseTwin, mask_of_new_tokens
from .verification import VerificationHook, likelihood


class SiriusCandidateGenerator(CandidateGenerator):
    """Lets the twin write a period of tokens into the dense model's KV-cache, and takes it back for the verification.

    Args:
        twin: the drafting model.
        call: the state of the running `generate` call.
        generation_config: the call's prepared configuration.
        logits_processor: the call's own list. Appended to it are the verification hook, if drafts may be kept that the
            dense model would not have written, and a look at the scores, where the call keeps them.
    """

    requires_model_outputs = True  # so that the loop hands over its model_kwargs, with the KV-cache
    model_kwargs_overrides: dict = {}

    def __init__(
        self, twin: SparseTwin, call: Call, generation_config: GenerationConfig, logits_processor: LogitsProcessorList
    ):
        self.twin = twin
        self.call = call
        self.config = twin.sirius_config
        self.do_sample = generation_config.do_sample
        self.generation_config = generation_config  # the call's own copy
        self.max_length = generation_config.max_length
        self._mask_length = getattr(generation_config, "_mask_length", None)
        self.logits_processor = LogitsProcessorList(logits_processor)
        # Criteria may read the scores so far, where the call keeps them. Then the dense model's decide.
        keeps_scores = generation_config.return_dict_in_generate and generation_config.output_scores
        self._scores: tuple[torch.Tensor, ...] | None = () if keeps_scores else None
        if keeps_scores:
            logits_processor.append(self._stop_at_scores)
        self.hook = None
        if self.config.threshold < 1.0:
            self.hook = VerificationHook(self.config.threshold, self.config.temperature, self.do_sample)
            logits_processor.append(self.hook)
        self._candidate_ids: torch.Tensor | None = None
        self._drafted_ids: torch.Tensor | None = None
        self._branches: Branches | None = None
        self._observed = contextlib.ExitStack()
        call.undo.push(self._observed)

    def get_candidates(
        self, input_ids: torch.LongTensor, model_kwargs: dict, is_first_iteration: bool, **kwargs
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Returns the sequence with the draft appended, and the draft's processed logits when sampling.

        Args:
            input_ids: long [1, length], all verified tokens.
            model_kwargs: the loop's own, with `past_key_values` of all tokens but the last.
            is_first_iteration: whether the dense model has yet to read the prompt. Then there is no draft.

        Returns:
            long [1, length + num_drafted] and, if any was sampled, float32 [1, num_drafted, vocab_size].
        """
        self.call.is_verifying = True
        if is_first_iteration:
            _check_mask(input_ids, model_kwargs)
            if IS_5_17:
                self.call.undo.callback(stop_recording, model_kwargs["past_key_values"])
            self._observe_next_forward(mask_of_new_tokens(model_kwargs))
            self._observed.enter_context(self._reading_new_tokens_only(input_ids, model_kwargs))
            return input_ids, None
        if self._candidate_ids is None:  # the prefill has made the cache's layers, if they were not there
            self.call.undo.enter_context(roomy(model_kwargs["past_key_values"]))
        candidate_ids, scores = self._draft(input_ids, model_kwargs)
        if self.config.reselect_every is not None:
            self._observe_next_forward(None, takes_weights=self._reselects())
        self._candidate_ids = candidate_ids
        self._verified_scores = self._scores
        self._drafted_ids = candidate_ids[:, input_ids.shape[1] :]
        if self.hook is not None:
            self.hook.arm(candidate_ids, start=input_ids.shape[1])
        return candidate_ids, torch.stack(scores, dim=1) if self.do_sample and scores else None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Takes note of a verification.

        Args:
            input_ids: long [1, length], the accepted tokens and the bonus token included.
            scores: float32 [1, num_drafted + 1, vocab_size], the processed logits; the hook's lifts are taken out of
                them.
            num_matches: number of accepted tokens.
        """
        if self.hook is not None:
            self.hook.restore(scores)
        if self._scores is not None:
            self._scores += tuple(scores[:, i] for i in range(num_matches + 1))
        self._observed.close()
        self.call.is_verifying = False
        self.generation_config.max_length = self.max_length
        bonus_likelihood = self._likelihoods(input_ids[:, -1:], scores[:, num_matches, None])[0]
        if self._drafted_ids is None:
            self.call.method.select()
            self._drafted_ids = input_ids[:, :0]
            self.call.stats.record_first(input_ids[0, -1].item(), bonus_likelihood)
            return
        if self._reselects():
            self.call.method.select()
        if self._branches is None:
            likelihoods = self._likelihoods(self._drafted_ids, scores[:, :-1])
        else:
            likelihoods = self._branches.leaf_likelihoods[self._branches.winner] if self._branches.leaf_ids else ()
        self.call.stats.record_cycle(
            Cycle(
                drafted_ids=tuple(self._drafted_ids[0].tolist()),
                num_accepted=int(num_matches),
                num_agreed=self._num_agreed(input_ids, scores, int(num_matches)),
                bonus_id=input_ids[0, -1].item(),
                is_full=not self._is_cut,
                likelihoods=likelihoods,
                bonus_likelihood=bonus_likelihood,
                branches=self._branches,
            )
        )

    def _likelihoods(self, token_ids: torch.LongTensor, scores: torch.Tensor) -> tuple[float, ...]:
        """Returns the full model's likelihood of each token, [1, num_tokens], by its scores at their places."""
        return tuple(likelihood(token_ids.to(scores.device), scores, self.config.temperature)[0].tolist())

    def _num_agreed(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> int:
        """Returns how many of the accepted tokens are the full model's argmax."""
        accepted_ids = input_ids[0, -num_matches - 1 : -1].to(scores.device)
        return (scores[0, :num_matches].argmax(dim=-1) == accepted_ids).sum().item()

    def _draft(self, input_ids: torch.LongTensor, model_kwargs: dict) -> tuple[torch.LongTensor, list[torch.Tensor]]:
        """Returns input_ids with up to `kernel_size - 1` drafted tokens, and the processed logits of each, [1,
        vocab_size].

        A greedy draft ends just before a token at which the call would stop (EOS, the length, any criterion): that
        token is then the dense model's own. A sampled draft ends with it, as leaving out what was drawn would skew the
        distribution.
        """
        # The last token before `max_length` is the dense model's.
        num_tokens = min(self.config.kernel_size - 1, self.max_length - input_ids.shape[1] - 1)
        draft_kwargs = dict(model_kwargs)
        cache = model_kwargs["past_key_values"]
        all_scores: list[torch.Tensor] = []
        num_steps, lengths_before = 0, layer_lengths(cache)
        confidence = self.config.draft_confidence
        self._is_cut = num_tokens < self.config.kernel_size - 1
        try:
            with self.call.method.drafting(), stepwise_windows(cache):
                for _ in range(num_tokens):
                    model_inputs = self.twin.prepare_inputs_for_generation(
                        input_ids, next_sequence_length=1, is_first_iteration=False, **draft_kwargs
                    )
                    outputs = self._forward_twin(model_inputs)
                    num_steps += 1
                    logits = outputs.logits[:, -1].to(dtype=torch.float32, device=input_ids.device, copy=True)
                    scores = self.logits_processor(input_ids, logits)
                    if self.do_sample:
                        next_ids = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
                    else:
                        next_ids = scores.argmax(dim=-1, keepdim=True)
                    next_input_ids = torch.cat([input_ids, next_ids], dim=-1)
                    stops = self._would_stop(next_input_ids, all_scores, scores)
                    self._is_cut |= stops
                    if stops and not self.do_sample:
                        break
                    input_ids = next_input_ids
                    all_scores.append(scores)
                    if stops:
                        self._end_output_at(input_ids.shape[1])
                        break
                    # Ends with the doubtful token, as leaving out what was drawn would skew the distribution.
                    if confidence and likelihood(next_ids[0], scores, self.config.temperature).item() < confidence:
                        break
                    draft_kwargs = self.twin._update_model_kwargs_for_generation(outputs, draft_kwargs)
        finally:
            roll_back(cache, lengths_before, num_steps)
        return input_ids, all_scores

    def _forward_twin(self, inputs: dict):
        """Returns the outputs of the twin. What the call asks of the dense model beside logits is not asked of it."""
        left_out = {name: False for name in ("output_attentions", "output_hidden_states") if inputs.get(name)}
        return self.twin(**{**inputs, **left_out}, return_dict=True)

    def _would_stop(self, input_ids: torch.LongTensor, draft_scores: list[torch.Tensor], scores: torch.Tensor) -> bool:
        seen = None if self._scores is None else (*self._scores, *draft_scores, scores)
        return bool(self.call.stopping_criteria(input_ids, seen).all())

    def _end_output_at(self, length: int) -> None:
        """Has the stock loop drop what this verification adds beyond a length: it trims at the length, not at
        criteria.
        """
        self.generation_config.max_length = min(self.generation_config.max_length, length)

    def _stop_at_scores(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor that ends the output at a candidate where the criteria are met by the dense model's
        scores.
        """
        length = input_ids.shape[1] + 1
        if self._candidate_ids is not None and length <= self._candidate_ids.shape[1]:
            self._verified_scores = (*self._verified_scores, scores.clone())
            if self.call.stopping_criteria(self._candidate_ids[:, :length], self._verified_scores).all():
                self._end_output_at(length)
        return scores

    def _observe_next_forward(self, attention_mask: torch.Tensor | None, takes_weights: bool = True) -> None:
        self._observed.enter_context(self.call.observing(attention_mask, takes_weights))
        # Later forwards, such as a processor may make, are none of the loop's.
        handle = self.call.model.register_forward_hook(self._end_observed)
        self._observed.callback(handle.remove)

    def _end_observed(self, *_) -> None:
        if Call.current() is self.call:
            self._observed.close()

    def _reselects(self) -> bool:
        """Whether the neurons are chosen anew after the running cycle."""
        every = self.config.reselect_every
        return every is not None and (self.call.stats.num_cycles + 1) % every == 0

    @contextlib.contextmanager
    def _reading_new_tokens_only(self, input_ids: torch.LongTensor, model_kwargs: dict):
        """Keeps the stock loop's first forward from reading again what a carried-over KV-cache already holds.

        Works around transformers 5.17 to 5.23, where assisted decoding hands the whole sequence to its first forward
        (plain `generate` slices it in `_prefill`). To go when that is mended there: the length is then right and
        nothing is sliced.
        """
        past_length = model_kwargs["past_key_values"].get_seq_length()
        attention_mask = model_kwargs.get("attention_mask")
        mask_length = self._mask_length if attention_mask is None else attention_mask.shape[1]
        length = input_ids.shape[1]
        if not past_length or mask_length != length:
            yield
            return

        def slice_inputs(module, args, inputs):
            if Call.current() is not self.call:  # another thread's forward
                return args, inputs
            for name in ("input_ids", "position_ids", "token_type_ids"):
                value = inputs.get(name)
                if value is not None and value.shape[-1] == length:
                    inputs[name] = value[..., past_length:]
            return args, inputs

        handle = self.call.model.register_forward_pre_hook(slice_inputs, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _check_mask(input_ids: torch.LongTensor, model_kwargs: dict) -> None:
    """Sees to a mask of another length than input_ids, which the stock assisted loop would cut to that length.

    Such is the case with inputs_embeds, and where only the new tokens of a turn are passed. Without padding the mask
    says nothing, so it is dropped (as newer versions of `generate` do themselves); with padding this is an error.
    """
    attention_mask = model_kwargs.get("attention_mask")
    if attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]:
        return
    if not attention_mask.all():
        raise ValueError(
            f"a padded attention_mask of {attention_mask.shape[1]} tokens came with {input_ids.shape[1]} input_ids, "
            "while assisted decoding takes them to be of one length: pass the input_ids of the whole sequence (not "
            "inputs_embeds, or of the new tokens alone), or leave the padding out"
        )
    del model_kwargs["attention_mask"]
