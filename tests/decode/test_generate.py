"""What stock `generate` promises at batch size 1 holds with a sparse twin as its assistant.

At `threshold=1.0` that means: the dense model's own output, token for token. Float64 throughout, since forwards over
one and over many tokens differ in the last bits of float32.
"""

import contextvars
import copy
import functools
import itertools
import threading
import time
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    KERNEL_SIZE,
    METHODS,
    SLIDING,
    VOCAB_SIZE,
    build_model,
    build_tokenizer,
    make_prompt,
    shared_model,
    slow,
    slow_unless,
)
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.cache_utils import DynamicLayer, QuantizedLayer
from transformers.generation.streamers import BaseStreamer

from hf_sirius import make_sparse
from hf_sirius.decode.call import Call
from hf_sirius.draft.draft import Draft
from hf_sirius.model import observation
from hf_sirius.model.compat import IS_5_17
from hf_sirius.sparsity.base import _drafting
from hf_sirius.sparsity.cats import Cats


PROMPT = make_prompt(11)
PROMPT_LENGTH = PROMPT.shape[1]
FAMILIES = ("llama", "phi3", "gpt2", "opt", *SLIDING)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


def pairs(families) -> list:
    """Returns the families with each method, as parameters; those that are not llama's or griffin's are slow."""
    return [
        pytest.param(
            family,
            fields,
            id=f"{family}-{name}",
            marks=slow_unless(family == "llama" or name == "griffin"),
        )
        for family in families
        for name, fields in METHODS.items()
    ]


def make_twin(model, method=METHODS["griffin"], **fields):
    return make_sparse(model, **{"density": 0.3, "kernel_size": KERNEL_SIZE, "threshold": 1.0, **method, **fields})


def generate(model, prompt=PROMPT, **kwargs):
    return model.generate(prompt, **{"max_new_tokens": 24, "do_sample": False, **kwargs})


def assert_same_output(model, method=METHODS["griffin"], make_kwargs=dict, **kwargs):
    """Generates with the model alone and with a twin, asserts that the tokens are the same, and returns the new ones.

    What keeps a state (criteria, streamers) comes from `make_kwargs`, once for each of the two calls.
    """
    with make_twin(model, method) as sparse:
        dense = generate(model, **kwargs, **make_kwargs())
        corrected = generate(model, assistant_model=sparse, **kwargs, **make_kwargs())
    assert corrected.tolist() == dense.tolist()
    return dense[0, PROMPT_LENGTH:].tolist()


@functools.cache
def dense_ids(family: str = "llama") -> list[int]:
    """Returns what the shared model writes after `PROMPT`."""
    return generate(shared_model(family))[0, PROMPT_LENGTH:].tolist()


def first_time_at(place: int) -> int:
    """Returns the first token from this place of the llama's output on that it has not written earlier."""
    ids = dense_ids()
    return next(ids[i] for i in range(place, len(ids)) if ids[i] not in ids[:i])


# Tokens


@pytest.mark.parametrize(("family", "method"), pairs(FAMILIES))
def test_output_is_the_dense_model_s(family, method):
    assert_same_output(shared_model(family), method)


def test_drafts_of_these_tests_are_accepted_as_well_as_rejected():
    for method in METHODS.values():
        # A random model loses more where attention is sparse as well.
        density = {"density": 0.7} if method["method"] == "teal" else {}
        with make_twin(shared_model(), method, **density) as sparse:
            generate(shared_model(), assistant_model=sparse, max_new_tokens=60)
            assert sparse.stats.num_accepted >= 10
            assert sparse.stats.num_rolled_back >= 10


@pytest.mark.parametrize(("family", "method"), pairs(SLIDING))
@pytest.mark.parametrize("prompt_length", [1, 8, *slow(7, 23)])
def test_sliding_windows_on_both_sides_of_the_window(family, method, prompt_length):
    assert_same_output(shared_model(family), method, prompt=make_prompt(prompt_length), max_new_tokens=30)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, *range(2 * KERNEL_SIZE - 1, 2 * KERNEL_SIZE + 3)])
@pytest.mark.parametrize("method", [METHODS["griffin"], METHODS["cats-topk"]], ids=["griffin", "cats-topk"])
def test_lengths_around_the_ends_of_periods(method, max_new_tokens):
    assert len(assert_same_output(shared_model(), method, max_new_tokens=max_new_tokens)) == max_new_tokens


@pytest.mark.parametrize("kernel_size", [2, 3, 16, 64])
def test_kernel_sizes(kernel_size):
    with make_twin(shared_model(), kernel_size=kernel_size) as sparse:
        output = generate(shared_model(), assistant_model=sparse)
    assert output[0, PROMPT_LENGTH:].tolist() == dense_ids()


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("method", [METHODS["griffin"], METHODS["cats-topk"]], ids=["griffin", "cats-topk"])
def test_eos_anywhere_in_a_period(method, place):
    eos = dense_ids()[place]
    ids = assert_same_output(shared_model(), method, eos_token_id=eos)
    assert ids == dense_ids()[: dense_ids().index(eos) + 1]


def test_several_eos_ids():
    eos = [VOCAB_SIZE - 1, first_time_at(9), first_time_at(5)]
    assert 4 < len(assert_same_output(shared_model(), eos_token_id=eos)) < 10


@every_method
@pytest.mark.parametrize("threshold", [1.0, 0.0])
def test_a_prompt_that_ends_with_eos_is_continued(threshold, method):
    with make_twin(shared_model(), method, threshold=threshold) as sparse:
        ids = generate(shared_model(), assistant_model=sparse, eos_token_id=PROMPT[0, -1].item())[0, PROMPT_LENGTH:]
    assert len(ids) > 1
    assert threshold < 1 or ids.tolist() == dense_ids()[: len(ids)]


@pytest.mark.parametrize("place", range(2, 10))
def test_below_threshold_one_the_output_ends_at_the_first_eos(place):
    model = shared_model()
    with make_twin(model, threshold=0.0) as sparse:
        free = generate(model, assistant_model=sparse)
        assert free.shape[1] == PROMPT_LENGTH + 24
        eos = free[0, PROMPT_LENGTH + place].item()
        ids = generate(model, assistant_model=sparse, eos_token_id=eos)[0, PROMPT_LENGTH:].tolist()
    assert eos not in ids[:-1]
    assert ids[-1] == eos or len(ids) == 24


# Logits processors


class ForbidRepeatsOf(LogitsProcessor):
    """Forbids the token that stands `distance` places back."""

    def __init__(self, distance: int):
        self.distance = distance

    def __call__(self, input_ids, scores):
        return scores.index_fill(-1, input_ids[0, -self.distance, None], -torch.inf)


def allowed_tokens(batch_id, input_ids):
    return [t for t in range(1, VOCAB_SIZE) if t % 3 == len(input_ids) % 3]


def processor_kwargs() -> dict[str, dict]:
    ids = dense_ids()
    eos = first_time_at(5)
    return {
        "repetition_penalty": {"repetition_penalty": 1.7},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
        "bad_words_ids": {"bad_words_ids": [[ids[3]], ids[6:8]]},
        "sequence_bias": {"sequence_bias": [[[ids[2]], -9.0], [[ids[5], ids[4]], 6.0]]},
        "min_new_tokens": {"min_new_tokens": 13, "eos_token_id": eos},
        "min_length": {"min_length": PROMPT_LENGTH + 9, "eos_token_id": eos},
        "forced_eos_token_id": {"forced_eos_token_id": 3, "max_new_tokens": 13},
        "suppress_tokens": {"suppress_tokens": ids[4:7]},
        "begin_suppress_tokens": {"begin_suppress_tokens": ids[:1]},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (4, 1.4), "eos_token_id": 3},
        "remove_invalid_values": {"remove_invalid_values": True},
        "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.3},
        "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed_tokens},
        "watermarking_config": {"watermarking_config": {"bias": 4.0, "seeding_scheme": "selfhash"}},
        "custom": {"logits_processor": LogitsProcessorList([ForbidRepeatsOf(2), ForbidRepeatsOf(5)])},
        "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": ids[:3]},
    }


@pytest.mark.parametrize("name", list(processor_kwargs()))
@pytest.mark.parametrize("method", [METHODS["griffin"], METHODS["cats-threshold"]], ids=["griffin", "cats"])
def test_logits_processors(name, method):
    ids = assert_same_output(shared_model(), method, **processor_kwargs()[name])
    if name not in ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "remove_invalid_values"):
        assert ids != dense_ids(), "the processor should have changed something"


def test_guidance_is_refused():
    """Its processor runs the model over a KV-cache of its own, in which drafts cannot be undone."""
    with make_twin(shared_model()) as sparse:
        with pytest.raises(ValueError, match="guidance_scale"):
            generate(shared_model(), assistant_model=sparse, guidance_scale=1.5)
        assert_still_works(shared_model(), sparse)


@pytest.mark.parametrize("tree_width", [1, 3])
def test_synthids_watermark_is_refused(tree_width):
    """Its processor counts the tokens that it is asked about, and drafts among them."""
    watermark = SynthIDTextWatermarkingConfig(ngram_len=5, keys=[1, 2, 3])
    with make_twin(shared_model(), tree_width=tree_width) as sparse:
        with pytest.raises(ValueError, match="use a WatermarkingConfig"):
            generate(shared_model(), assistant_model=sparse, watermarking_config=watermark)
        assert_still_works(shared_model(), sparse)


@pytest.mark.parametrize(
    "method",
    [
        *METHODS.values(),
        {"method": "griffin", "draft_dtype": "bfloat16", "draft_scope": "all"},
        {"method": "griffin", "tree_width": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("alone", [False, True])
def test_attentions_are_recorded_once(method, family, alone):
    """Transformers lays hooks on the modules for it, many of which are the twin's as well."""
    model = build_model(family)
    model.set_attn_implementation("eager")
    num_layers = model.config.num_hidden_layers
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_attentions": True, "output_hidden_states": True}
    with make_twin(model, method) as sparse:
        if alone:
            outputs = sparse.generate(PROMPT, **options)
        else:
            outputs = model.generate(PROMPT, assistant_model=sparse, **options)
        assert {len(step) for step in outputs.attentions} == {num_layers}
        assert {len(step) for step in outputs.hidden_states} == {num_layers + 1}
    dense = model(PROMPT, output_attentions=True, output_hidden_states=True)
    assert len(dense.attentions) == num_layers and len(dense.hidden_states) == num_layers + 1


def test_processors_of_the_user_s_list_stay_alone_in_it():
    processors = LogitsProcessorList([ForbidRepeatsOf(2)])
    with make_twin(shared_model(), threshold=0.1) as sparse:
        generate(shared_model(), assistant_model=sparse, logits_processor=processors)
    assert [type(p) for p in processors] == [ForbidRepeatsOf]


def test_settings_from_a_generation_config():
    config = GenerationConfig(max_new_tokens=17, repetition_penalty=1.3, do_sample=False, eos_token_id=3)
    model = shared_model()
    with make_twin(model) as sparse:
        corrected = model.generate(PROMPT, generation_config=config, assistant_model=sparse)
    assert torch.equal(corrected, model.generate(PROMPT, generation_config=config))


# Stopping criteria


class StopWhen(StoppingCriteria):
    """Stops when `predicate(new_ids, scores)` holds."""

    def __init__(self, predicate):
        self.predicate = predicate

    def __call__(self, input_ids, scores, **kwargs):
        is_done = self.predicate(input_ids[0, PROMPT_LENGTH:].tolist(), scores)
        return torch.full((input_ids.shape[0],), bool(is_done), device=input_ids.device)


def stop_when(predicate) -> StoppingCriteriaList:
    return StoppingCriteriaList([StopWhen(predicate)])


@pytest.mark.parametrize("num_tokens", range(1, 2 * KERNEL_SIZE + 2))
def test_criterion_on_the_number_of_tokens(num_tokens):
    ids = assert_same_output(shared_model(), stopping_criteria=stop_when(lambda ids, _: len(ids) >= num_tokens))
    assert len(ids) == num_tokens


@pytest.mark.parametrize("modulus", [3, 5, 7, 11])
@every_method
def test_criterion_on_the_tokens(method, modulus):
    criteria = stop_when(lambda ids, _: len(ids) > 2 and sum(ids) % modulus == 0)
    assert 2 < len(assert_same_output(shared_model(), method, stopping_criteria=criteria)) < 24


def generate_with_scores(model, **kwargs):
    return generate(model, return_dict_in_generate=True, output_scores=True, **kwargs)


@pytest.mark.parametrize("num_tokens", [1, 4, 7, 9])
def test_criterion_is_given_as_many_scores_as_tokens(num_tokens):
    seen = []

    def has_scores(ids, scores):
        seen.append((len(ids), len(scores)))
        return len(scores) >= num_tokens

    with make_twin(shared_model()) as sparse:
        output = generate_with_scores(shared_model(), assistant_model=sparse, stopping_criteria=stop_when(has_scores))
    assert output.sequences.shape[1] == PROMPT_LENGTH + num_tokens
    assert all(num_ids == num_scores for num_ids, num_scores in seen)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("at", ["high", "low"])
def test_criterion_on_the_scores(seed, at):
    """The draft's scores and the dense model's differ: it is for the latter to say where the output ends."""
    model = shared_model("llama", seed)
    scores = generate_with_scores(model).scores
    confidences = torch.stack([s.softmax(-1).max() for s in scores])
    limit = confidences[:12].max() if at == "high" else confidences[:12].min()

    def is_there(ids, scores):
        confidence = scores[-1].softmax(-1).max()
        return confidence >= limit - 1e-6 if at == "high" else confidence <= limit + 1e-6

    criteria = stop_when(is_there)
    with make_twin(model, METHODS["cats-topk"]) as sparse:
        dense = generate_with_scores(model, stopping_criteria=criteria).sequences
        corrected = generate_with_scores(model, stopping_criteria=criteria, assistant_model=sparse).sequences
    assert dense.shape[1] <= PROMPT_LENGTH + 12
    assert corrected.tolist() == dense.tolist()


@pytest.mark.parametrize("place", [0, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("num_words", [1, 2])
def test_stop_strings(place, num_words):
    tokenizer = build_tokenizer()
    stop = tokenizer.decode(dense_ids()[place : place + num_words])
    assert_same_output(shared_model(), stop_strings=[stop], tokenizer=tokenizer)


def test_stop_strings_end_the_output_early():
    tokenizer = build_tokenizer()
    ids = assert_same_output(shared_model(), stop_strings=tokenizer.decode(dense_ids()[6:8]), tokenizer=tokenizer)
    assert len(ids) == 8


@pytest.mark.parametrize("max_time, num_tokens", [(1000.0, 24), (1e-9, 1)])
def test_max_time(max_time, num_tokens):
    assert len(assert_same_output(shared_model(), max_time=max_time)) == num_tokens


@pytest.mark.parametrize("num_tokens", range(1, 10))
def test_max_time_that_runs_out_in_the_middle_of_a_draft(monkeypatch, num_tokens):
    """The clock jumps when a token at this place is about to be written, be it by the draft."""
    model, real_time, has_jumped = shared_model(), time.time, []
    monkeypatch.setattr(time, "time", lambda: real_time() + 1e6 * bool(has_jumped))

    class Jump(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == PROMPT_LENGTH + num_tokens:
                has_jumped.append(True)
            return scores

    with make_twin(model, METHODS["cats-topk"]) as sparse:
        output = generate(model, max_time=1e5, logits_processor=LogitsProcessorList([Jump()]), assistant_model=sparse)
    ids = output[0, PROMPT_LENGTH:].tolist()
    assert ids == dense_ids()[: len(ids)]
    assert max(1, num_tokens + 1 - (KERNEL_SIZE - 1)) <= len(ids) <= num_tokens + 1


# Streamers


class Collect(BaseStreamer):
    def __init__(self):
        self.parts: list[list[int]] = []
        self.num_ends = 0

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.num_ends += 1


@pytest.mark.parametrize("threshold", [1.0, 0.05])
@pytest.mark.parametrize("stop", ["length", "eos"])
def test_streamer_gets_the_verified_tokens_once(threshold, stop):
    kwargs = {"eos_token_id": first_time_at(7)} if stop == "eos" else {}
    streamer = Collect()
    with make_twin(shared_model(), threshold=threshold) as sparse:
        output = generate(shared_model(), streamer=streamer, assistant_model=sparse, **kwargs)
    assert list(itertools.chain(*streamer.parts)) == output[0].tolist()
    assert len(streamer.parts) == 2 + sparse.stats.num_cycles, "the prompt, the first token, and one part a cycle"
    assert streamer.num_ends == 1


def test_text_streamers_write_the_output(capsys):
    model, tokenizer = shared_model(), build_tokenizer()
    text = tokenizer.decode(dense_ids())
    with make_twin(model) as sparse:
        generate(model, streamer=TextStreamer(tokenizer, skip_prompt=True), assistant_model=sparse)
        assert capsys.readouterr().out.strip() == text
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=lambda: generate(model, streamer=streamer, assistant_model=sparse))
        thread.start()
        assert "".join(streamer).strip() == text
        thread.join()


# What a call returns


ALL_OUTPUTS = {f"output_{name}": True for name in ("scores", "logits", "attentions", "hidden_states")}


@every_method
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_returned_scores_and_logits_are_the_dense_model_s(family, method):
    model = shared_model(family)
    kwargs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    with make_twin(model, method) as sparse:
        dense, corrected = generate(model, **kwargs), generate(model, assistant_model=sparse, **kwargs)
    assert torch.equal(corrected.sequences, dense.sequences)
    for name in ("scores", "logits"):
        assert len(corrected[name]) == len(dense[name]) == 24
        torch.testing.assert_close(torch.cat(corrected[name]), torch.cat(dense[name]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threshold", [1.0, 0.05])
def test_returned_hidden_states_and_attentions_are_those_of_each_token(threshold):
    model = build_model()
    model.set_attn_implementation("eager")
    with make_twin(model, threshold=threshold) as sparse:
        output = generate(model, assistant_model=sparse, return_dict_in_generate=True, **ALL_OUTPUTS)
    assert len(output.hidden_states) == len(output.attentions) == 24
    with torch.no_grad():
        dense = model(output.sequences, output_hidden_states=True)
    states = torch.cat([step[-1] for step in output.hidden_states], dim=1)
    torch.testing.assert_close(states, dense.hidden_states[-1][:, :-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.05])
@every_method
def test_returned_scores_below_threshold_one_are_not_lifted(method, threshold, do_sample):
    model = shared_model()
    bias = {(3,): 1.5, (7, 9): -2.0}
    torch.manual_seed(0)
    kwargs = {"do_sample": True, "top_k": 0, "temperature": 0.7} if do_sample else {}
    with make_twin(model, method, threshold=threshold) as sparse:
        output = generate(
            model, assistant_model=sparse, return_dict_in_generate=True, output_scores=True, output_logits=True,
            sequence_bias=bias, **kwargs,
        )  # fmt: skip
        assert sparse.stats.num_accepted > 0
    with torch.no_grad():
        logits = model(output.sequences).logits[0, PROMPT_LENGTH - 1 : -1].float()
    scores = logits.clone()
    scores[:, 3] += 1.5
    scores[output.sequences[0, PROMPT_LENGTH - 1 : -1] == 7, 9] -= 2.0
    torch.testing.assert_close(torch.cat(output.logits), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(output.scores), scores / kwargs.get("temperature", 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stop, threshold", [("length", 1.0), ("length", 0.05), ("eos", 1.0), ("criterion", 0.05)])
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_is_left_as_a_dense_prefill_would(family, stop, threshold):
    model = shared_model(family)
    kwargs = {
        "length": {"max_new_tokens": 22},
        "eos": {"eos_token_id": dense_ids(family)[9]},
        "criterion": {"stopping_criteria": stop_when(lambda ids, _: len(ids) == 9)},
    }[stop]
    with make_twin(model, threshold=threshold) as sparse:
        output = generate(model, assistant_model=sparse, return_dict_in_generate=True, **kwargs)
    cache, sequence = output.past_key_values, output.sequences
    assert cache.get_seq_length() == sequence.shape[1] - 1
    fresh = DynamicCache(config=model.config)
    with torch.no_grad():
        model(sequence[:, :-1], past_key_values=fresh, use_cache=True)
    tolerance = 1e-5 if family == "gemma2" else 1e-10  # eager attention has a float32 softmax
    for layer, expected in zip(cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, atol=tolerance, rtol=0)
        torch.testing.assert_close(layer.values, expected.values, atol=tolerance, rtol=0)


# Other ways to give a prompt


def pad_left(num_padding: int = 4) -> dict[str, torch.Tensor]:
    return {
        "prompt": torch.nn.functional.pad(PROMPT, (num_padding, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(PROMPT), (num_padding, 0)),
    }


@pytest.mark.parametrize(("family", "method"), pairs(FAMILIES))
def test_left_padding(family, method):
    assert_same_output(shared_model(family), method, **pad_left())


def record_selections(monkeypatch) -> list:
    """Returns a list to which every selection of a call adds its neurons or thresholds."""
    selections = []
    select = Draft.select

    def noting(draft):
        select(draft)
        chosen = draft.method.cutoffs.values if isinstance(draft.method, Cats) else draft.method.neuron_indices
        selections.append([x.tolist() for x in chosen])

    monkeypatch.setattr(Draft, "select", noting)
    return selections


@pytest.mark.parametrize("method", [METHODS["griffin"], METHODS["cats-threshold"]], ids=["griffin", "cats"])
@pytest.mark.parametrize("alone", [False, True], ids=["corrected", "sparse alone"])
def test_padding_does_not_count_in_the_selection(monkeypatch, method, alone):
    selections = record_selections(monkeypatch)
    model = shared_model()
    with make_twin(model, method) as sparse:
        kwargs = {} if alone else {"assistant_model": sparse}
        generate(sparse if alone else model, **kwargs)
        generate(sparse if alone else model, **pad_left(), **kwargs)
    assert len(selections) == 2
    assert selections[0] == selections[1]


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("method", [METHODS["griffin"], METHODS["cats-threshold"]], ids=["griffin", "cats"])
def test_a_chunked_prefill_selects_as_a_whole_one(monkeypatch, method, chunk):
    selections = record_selections(monkeypatch)
    with make_twin(shared_model(), method) as sparse:
        outputs = [generate(sparse, **pad_left()), generate(sparse, prefill_chunk_size=chunk, **pad_left())]
    assert selections[0] == selections[1]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_position_ids(family):
    position_ids = torch.arange(3, 3 + PROMPT_LENGTH).unsqueeze(0)
    ids = assert_same_output(shared_model(family), position_ids=position_ids)
    if family == "gpt2":
        assert ids != dense_ids("gpt2")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_prompt_of_embeddings(family):
    model = shared_model(family)
    embeddings = model.get_input_embeddings()(PROMPT).detach()
    new_ids = assert_same_output(model, prompt=None, inputs_embeds=embeddings)
    assert len(new_ids) == 24 - PROMPT_LENGTH, "only new tokens are returned"


@pytest.mark.parametrize("tree_width", [1, 3])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_of_embeddings_behind_a_cache(family, with_ids, tree_width):
    model = shared_model(family)
    options = {"inputs_embeds": model.get_input_embeddings()(PROMPT).detach(), "max_new_tokens": 12}

    def cache():
        with torch.no_grad():
            return model(PROMPT[:, :8], past_key_values=DynamicCache(config=model.config)).past_key_values

    prompt = PROMPT if with_ids else None
    expected = model.generate(prompt, past_key_values=cache(), **options)
    with make_twin(model, tree_width=tree_width) as sparse:
        outputs = model.generate(prompt, past_key_values=cache(), assistant_model=sparse, **options)
        assert torch.equal(outputs, expected) and sparse.stats.num_drafted


def test_padded_prompt_of_embeddings_is_refused():
    """The stock assisted loop cuts the mask to the length of input_ids, of which there are none."""
    model, kwargs = shared_model(), pad_left()
    embeddings = model.get_input_embeddings()(kwargs.pop("prompt")).detach()
    with make_twin(model) as sparse, pytest.raises(ValueError, match="padded attention_mask"):
        generate(model, None, inputs_embeds=embeddings, assistant_model=sparse, **kwargs)


# A second turn over the first one's KV-cache


def count_tokens_read(model, call) -> tuple[torch.Tensor, list[int]]:
    """Returns the call's output and the number of tokens of each dense forward."""
    lengths = []

    def count(embedding, args):
        if _drafting.get() is None:  # the twin has the same embedding
            lengths.append(args[0].shape[1])

    handle = model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        return call(), lengths
    finally:
        handle.remove()


@pytest.mark.parametrize("first", ["dense", "corrected"])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", *slow("phi3", "opt", "gemma2", "gemma3_text")])
def test_second_turn_reads_only_the_new_tokens(family, is_padded, first):
    model = shared_model(family)
    kwargs = pad_left() if is_padded else {"prompt": PROMPT}
    with make_twin(model) as sparse:
        assistant = {"assistant_model": sparse} if first == "corrected" else {}
        turn = generate(model, return_dict_in_generate=True, max_new_tokens=10, **assistant, **kwargs)
        question = make_prompt(6, seed=1)
        kwargs["prompt"] = torch.cat([turn.sequences, question], dim=1)
        if is_padded:
            num_ones = kwargs["prompt"].shape[1] - kwargs["attention_mask"].shape[1]
            kwargs["attention_mask"] = torch.nn.functional.pad(kwargs["attention_mask"], (0, num_ones), value=1)
        cache = copy.deepcopy(turn.past_key_values)
        dense, dense_lengths = count_tokens_read(
            model, lambda: generate(model, past_key_values=copy.deepcopy(cache), **kwargs)
        )
        corrected, lengths = count_tokens_read(
            model, lambda: generate(model, past_key_values=cache, assistant_model=sparse, **kwargs)
        )
    assert corrected.tolist() == dense.tolist() == generate(model, **kwargs).tolist()
    # The first turn's last token is not yet in the cache.
    assert lengths[0] == dense_lengths[0] == question.shape[1] + 1
    assert all(length <= KERNEL_SIZE for length in lengths[1:])


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_cache_that_holds_the_whole_prompt(is_padded):
    model, prompt = build_model(), make_prompt()
    mask = torch.ones_like(prompt)
    mask[:, : 3 * is_padded] = 0
    options = {"max_new_tokens": 12, "attention_mask": mask, "pad_token_id": 0}

    def cache(length):
        with torch.no_grad():
            past = DynamicCache(config=model.config)
            return model(prompt[:, :length], attention_mask=mask[:, :length], past_key_values=past).past_key_values

    with make_sparse(model, method="griffin", threshold=1.0, kernel_size=4) as sparse:
        if IS_5_17 or is_padded:
            with pytest.raises(ValueError, match="the KV-cache holds 11 tokens"):
                model.generate(prompt, past_key_values=cache(11), assistant_model=sparse, **options)
        else:
            outputs = model.generate(prompt, past_key_values=cache(11), assistant_model=sparse, **options)
            assert torch.equal(outputs, model.generate(prompt, past_key_values=cache(11), **options))
        # As it says.
        outputs = model.generate(prompt, past_key_values=cache(10), assistant_model=sparse, **options)
    assert torch.equal(outputs, model.generate(prompt, past_key_values=cache(10), **options))


@pytest.mark.parametrize("tree_width", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])  # of the last one positions have no end
def test_drafts_end_where_positions_do(family, tree_width):
    num_positions = 24
    model, prompt, num_drafted = build_model(family, max_position_embeddings=num_positions), make_prompt(), 0
    whole = model.generate(prompt, max_new_tokens=num_positions - prompt.shape[1])[0, prompt.shape[1] :].tolist()
    for eos in whole[3:]:
        options = {"max_new_tokens": 60, "eos_token_id": eos, "pad_token_id": 0}
        expected = model.generate(prompt, **options)
        with make_twin(model, density=0.9, tree_width=tree_width) as sparse:
            assert torch.equal(model.generate(prompt, assistant_model=sparse, **options), expected)
            num_drafted += sparse.stats.num_drafted
    assert num_drafted


_LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 20,
    "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 2.5, 3.0],
}  # fmt: skip
GROWING = {
    "longrope": ("llama", {"rope_parameters": _LONG, "max_position_embeddings": 96}),
    "phi3 longrope": (
        "phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 20, "max_position_embeddings": 96}
    ),
    "phi3": ("phi3", {"original_max_position_embeddings": 20, "max_position_embeddings": 96}),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 20},
    ),
}  # fmt: skip


@pytest.mark.parametrize("padding", [0, *slow(3)])
@pytest.mark.parametrize("tree_width", [1, 3])
@pytest.mark.parametrize("kind", list(GROWING))
def test_positions_whose_encoding_changes_with_the_length(kind, tree_width, padding):
    family, fields = GROWING[kind]
    if IS_5_17 and family == "phi3":
        pytest.skip("there plain generate forgets what it has read")
    prompt, num_drafted = make_prompt(), 0
    mask = torch.ones_like(prompt)
    mask[:, :padding] = 0
    for seed in range(3):
        for max_new_tokens in (6, 40):  # before the limit, and past it
            options = {"max_new_tokens": max_new_tokens, "attention_mask": mask, "pad_token_id": 0}
            expected = build_model(family, seed, **fields).generate(prompt, **options)
            model = build_model(family, seed, **fields)
            with make_sparse(
                model, method="griffin", threshold=1.0, density=1.0, kernel_size=5, tree_width=tree_width
            ) as sparse:
                assert torch.equal(model.generate(prompt, assistant_model=sparse, **options), expected)
                num_drafted += sparse.stats.num_drafted
            assert torch.equal(model.generate(prompt, **options), expected)  # nor is anything left
    assert num_drafted


@pytest.mark.parametrize("tree_width", [1, 3])
def test_a_quantized_cache_is_refused_before_the_first_token(tree_width):
    class Layer(QuantizedLayer):
        _quantize = _dequantize = None

        def __init__(self):
            DynamicLayer.__init__(self)

    model, cache, written = build_model(), DynamicCache(), []
    cache.layers = [Layer(), Layer()]
    streamer = types.SimpleNamespace(put=written.append, end=lambda: None)
    with (
        make_sparse(model, method="griffin", threshold=1.0, tree_width=tree_width) as sparse,
        pytest.raises(ValueError, match="cannot be rolled back from a quantized KV-cache"),
    ):
        model.generate(
            make_prompt(), past_key_values=cache, max_new_tokens=5, assistant_model=sparse, streamer=streamer
        )
    assert len(written) <= 1  # the prompt


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("do_sample", "tree_width"), [(False, 1), (True, 1), (False, 3)])
def test_a_processor_of_another_dtype(do_sample, tree_width, dtype):
    class Cast(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.to(dtype)

    model = build_model(dtype=torch.float32)
    for threshold in (0.1, 1.0):
        with make_sparse(model, method="griffin", threshold=threshold, kernel_size=4, tree_width=tree_width) as sparse:
            options = {"max_new_tokens": 16, "do_sample": do_sample, "logits_processor": [Cast()]}
            outputs = model.generate(make_prompt(), assistant_model=sparse, **options)
            assert outputs.shape[1] == make_prompt().shape[1] + 16 and sparse.stats.num_drafted
            if threshold == 1.0 and not do_sample and dtype == torch.float64:
                assert torch.equal(outputs, model.generate(make_prompt(), **options))


def test_third_turn():
    model = shared_model("mistral")
    cache, sequence = DynamicCache(config=model.config), PROMPT
    with make_twin(model) as sparse:
        for turn in range(3):
            dense = generate(model, prompt=sequence, max_new_tokens=13)
            kwargs = {"past_key_values": cache, "assistant_model": sparse}
            sequence = generate(model, prompt=sequence, max_new_tokens=13, **kwargs)
            assert torch.equal(sequence, dense)
            sequence = torch.cat([sequence, make_prompt(3, seed=turn)], dim=1)


# The twin alone


@every_method
def test_sparse_alone_prefills_densely(method):
    for seed in range(5):
        with make_twin(shared_model(), method, density=0.1) as sparse:
            prompt = make_prompt(9, seed)
            output, dense = generate(sparse, prompt), generate(shared_model(), prompt)
            assert output[0, 9] == dense[0, 9]
            assert not torch.equal(output, dense), "a tenth of the neurons should not write the same"
            assert 0 < sparse.stats.draft_density < 1


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_alone_with_all_neurons_is_dense(family, method):
    with make_twin(shared_model(family), method, density=1.0) as sparse:
        assert generate(sparse)[0, PROMPT_LENGTH:].tolist() == dense_ids(family)


def test_a_forward_of_the_twin_is_dense():
    model = shared_model()
    with make_twin(model) as sparse, torch.no_grad():
        assert torch.equal(sparse(PROMPT).logits, model(PROMPT).logits)


# Exceptions


class Interrupt(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Raises at its n-th use, as whatever it is passed as."""

    def __init__(self, error: type[BaseException], n: int):
        self.error, self.num_left = error, n

    def __call__(self, input_ids, scores):
        self.put(None)
        return torch.zeros(1, dtype=torch.bool) if scores is None else scores

    def put(self, value):
        self.num_left -= 1
        if self.num_left == 0:
            raise self.error("on purpose")

    def end(self):
        pass


def assert_nothing_is_left(model):
    for name, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, name
    assert Call.current() is None
    assert _drafting.get() is None
    assert observation._observer.get() is None


def assert_still_works(model, sparse):
    assert_nothing_is_left(model)
    assert generate(model)[0, PROMPT_LENGTH:].tolist() == dense_ids()
    assert generate(model, assistant_model=sparse)[0, PROMPT_LENGTH:].tolist() == dense_ids()
    assert_nothing_is_left(model)


@every_method
def test_nothing_is_left_after_a_call(method):
    with make_twin(shared_model(), method) as sparse:
        assert_still_works(shared_model(), sparse)
        generate(sparse)
        assert_still_works(shared_model(), sparse)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["logits_processor", "stopping_criteria", "streamer"])
@pytest.mark.parametrize("n", [1, 5])
def test_nothing_is_left_after_an_exception(place, n, error):
    interrupt = Interrupt(error, n)
    wrap = {"logits_processor": LogitsProcessorList, "stopping_criteria": StoppingCriteriaList}
    kwargs = {place: wrap[place]([interrupt]) if place in wrap else interrupt}
    with make_twin(shared_model()) as sparse:
        with pytest.raises(error, match="on purpose"):
            generate(shared_model(), assistant_model=sparse, **kwargs)
        assert_still_works(shared_model(), sparse)


@pytest.mark.parametrize("place", ["prefill", "draft", "prefill of the twin alone", "decoding of the twin alone"])
@every_method
def test_nothing_is_left_after_an_exception_in_a_forward(method, place):
    def interrupt(*args):
        raise KeyboardInterrupt("on purpose")

    model = shared_model()
    with make_twin(model, method) as sparse:
        owner = model if "prefill" in place else sparse
        handle = owner.base_model.layers[-1].register_forward_pre_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt, match="on purpose"):
                if "alone" in place:
                    generate(sparse)
                else:
                    generate(model, assistant_model=sparse)
        finally:
            handle.remove()
        assert_still_works(model, sparse)


# Calls within and beside calls


@every_method
def test_two_threads_on_one_twin(method):
    model = shared_model()
    prompts = [make_prompt(9 + i, seed=i) for i in range(2)]
    all_stats: dict[int, list] = {}
    with make_twin(model, method) as sparse:
        new_call = sparse.new_call

        def noted_call(*args):
            call = new_call(*args)
            all_stats.setdefault(threading.get_ident(), []).append(call.stats)
            return call

        sparse.new_call = noted_call
        expected = [generate(model, prompt).tolist() for prompt in prompts]
        for prompt in prompts:
            generate(model, prompt, assistant_model=sparse)
        expected_stats = [stats.as_dict() for stats in all_stats.pop(threading.get_ident())]
        results: list[list] = [[], []]
        barrier = threading.Barrier(2)

        def work(i):
            for _ in range(2):
                barrier.wait()
                results[i].append(generate(model, prompts[i], assistant_model=sparse).tolist())
            results[i].append([stats.as_dict() for stats in all_stats[threading.get_ident()]])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(2):
        *outputs, stats = results[i]
        assert outputs == [expected[i]] * 2
        assert stats == [expected_stats[i]] * 2


class OnFirstCall(LogitsProcessor):
    """Does something else while the first token of the call is processed."""

    def __init__(self, action):
        self.action, self.result = action, None

    def __call__(self, input_ids, scores):
        if self.result is None:
            self.result = self.action()
        return scores


def in_another_context(action):
    """Runs it as another thread would see the model's hooks."""
    return contextvars.Context().run(action)


@pytest.mark.parametrize("run", [in_another_context, lambda action: action()], ids=["another thread", "same thread"])
def test_a_forward_beside_a_second_turn_is_left_alone(run):
    """A dense forward of the very length of the call's sequence, while the call's first token is chosen."""
    model = shared_model()
    with make_twin(model) as sparse, torch.no_grad():
        turn = generate(model, return_dict_in_generate=True)
        other = make_prompt(turn.sequences.shape[1], seed=3)
        expected = model(input_ids=other).logits
        beside = OnFirstCall(lambda: run(lambda: model(input_ids=other).logits))
        generate(
            model, turn.sequences, past_key_values=turn.past_key_values, assistant_model=sparse,
            logits_processor=LogitsProcessorList([beside]),
        )  # fmt: skip
    assert beside.result.shape == expected.shape
    assert torch.equal(beside.result, expected)


@pytest.mark.parametrize("method", [METHODS["griffin"], METHODS["cats-threshold"]], ids=["griffin", "cats"])
def test_a_processor_s_own_forwards_do_not_count_in_the_selection(monkeypatch, method):
    selections = record_selections(monkeypatch)
    model = shared_model()
    beside = OnFirstCall(lambda: model(make_prompt(20, seed=3)))
    with make_twin(model, method) as sparse:
        generate(model, assistant_model=sparse)
        generate(model, assistant_model=sparse, logits_processor=LogitsProcessorList([beside]))
    assert selections[0] == selections[1]


@pytest.mark.parametrize("place", [0, 3, 5, 6])
def test_a_dense_call_within_a_call_does_not_change_its_criteria(place):
    model = shared_model()
    beside = OnFirstCall(lambda: generate(model, make_prompt(200, seed=2), max_new_tokens=1))
    criteria = stop_when(lambda ids, _: len(ids) >= 3 + place)
    with make_twin(model) as sparse:
        output = generate(
            model, assistant_model=sparse, stopping_criteria=criteria, logits_processor=LogitsProcessorList([beside])
        )
    assert output[0, PROMPT_LENGTH:].tolist() == dense_ids()[: 3 + place]
    assert sparse.stats.num_drafted > 0 or place == 0


def test_twins_side_by_side():
    model = shared_model()
    with make_twin(model, METHODS["griffin"]) as coarse, make_twin(model, METHODS["cats-topk"], kernel_size=8) as fine:
        for sparse in (coarse, fine, coarse):
            assert generate(model, assistant_model=sparse)[0, PROMPT_LENGTH:].tolist() == dense_ids()
        coarse.detach()
        assert generate(model, assistant_model=fine)[0, PROMPT_LENGTH:].tolist() == dense_ids()


def test_a_second_twin_alone_is_as_sparse_as_the_first():
    with make_twin(shared_model(), density=0.1) as first, make_twin(shared_model(), density=0.1) as second:
        assert torch.equal(generate(first), generate(second))
        assert second.stats.draft_density == first.stats.draft_density is not None


@pytest.mark.parametrize("kwargs", ["another model", "prompt lookup"])
def test_other_assistants_work_beside_a_twin(kwargs):
    model = shared_model()
    kwargs = {"assistant_model": build_model(seed=1)} if kwargs == "another model" else {"prompt_lookup_num_tokens": 3}
    with make_twin(model) as sparse:
        assert generate(model, **kwargs)[0, PROMPT_LENGTH:].tolist() == dense_ids()
        assert sparse.stats.num_cycles == 0


# Where else `generate` is called from


def test_pipeline():
    model, tokenizer = build_model(), build_tokenizer()
    text = tokenizer.decode(PROMPT[0])
    settings = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}
    with make_twin(model) as sparse:
        assisted = pipeline("text-generation", model=model, tokenizer=tokenizer, assistant_model=sparse)
        texts = [result[0]["generated_text"] for result in assisted([text, "w1 w2 w3"], **settings)]
        assert sparse.stats.num_drafted > 0
    plain = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert texts == [result[0]["generated_text"] for result in plain([text, "w1 w2 w3"], **settings)]


@every_method
def test_inference_mode(method):
    with torch.inference_mode(), make_twin(shared_model(), method, threshold=0.0) as sparse:
        generate(shared_model(), assistant_model=sparse, return_dict_in_generate=True, output_scores=True)
    with torch.inference_mode():
        assert_same_output(shared_model(), method)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("do_sample", [False, True])
def test_other_dtypes_run(dtype, method, do_sample):
    model = build_model(dtype=dtype)
    with make_twin(model, method, threshold=0.1) as sparse:
        output = generate(model, assistant_model=sparse, do_sample=do_sample)
    assert output.shape == (1, PROMPT_LENGTH + 24)
    assert sparse.stats.num_drafted > 0


# What is refused


def test_a_batch_is_refused():
    batch = PROMPT.repeat(2, 1)
    model = shared_model()
    with make_twin(model) as sparse:
        for call in (
            lambda: generate(model, batch, assistant_model=sparse),
            lambda: model.generate(input_ids=batch, assistant_model=sparse, max_new_tokens=2),
            lambda: model.generate(inputs_embeds=model.get_input_embeddings()(batch), assistant_model=sparse),
            lambda: generate(sparse, batch),
        ):
            with pytest.raises(ValueError, match="one sequence at a time, got a batch of 2"):
                call()
        assert_still_works(model, sparse)


def test_a_twin_of_another_model_is_refused():
    with make_twin(build_model(seed=1)) as foreign, make_twin(shared_model()) as sparse:
        with pytest.raises(ValueError, match="not attached to the model"):
            generate(shared_model(), assistant_model=foreign)
        assert_still_works(shared_model(), sparse)


def test_a_detached_twin_is_refused():
    with make_twin(shared_model()) as other:
        sparse = make_twin(shared_model())
        sparse.detach()
        with pytest.raises(ValueError, match="not attached to the model"):
            generate(shared_model(), assistant_model=sparse)
        assert_still_works(shared_model(), other)


def test_an_ensemble_weight_is_refused():
    with make_twin(shared_model()) as sparse:
        with pytest.raises(ValueError, match=r"lower SiriusConfig\.threshold"):
            generate(shared_model(), assistant_model=sparse, assistant_ensemble_weight=0.5)
        assert_still_works(shared_model(), sparse)


# Any of it, at random


random_processors = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.8, 1.2, 2.0]),
        "no_repeat_ngram_size": st.integers(1, 3),
        "suppress_tokens": st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=9),
        "min_new_tokens": st.integers(1, 9),
        "eos_token_id": st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=5),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(["llama", "gpt2", "phi3", "mistral"]),
    model_seed=st.integers(0, 4),
    prompt_length=st.integers(1, 20),
    prompt_seed=st.integers(0, 10**6),
    num_padding=st.integers(0, 3),
    method=st.sampled_from(
        [*METHODS.values(), {"method": "griffin", "reselect_every": 1}, {"method": "griffin", "reselect_every": 2}]
    ),
    draft_confidence=st.sampled_from([0.0, 0.3, 0.9]),
    density=st.floats(0.02, 1.0),
    kernel_size=st.integers(2, 9),
    max_new_tokens=st.integers(1, 22),
    processors=random_processors,
)
def test_any_call_gives_the_dense_output(
    family,
    model_seed,
    prompt_length,
    prompt_seed,
    num_padding,
    method,
    draft_confidence,
    density,
    kernel_size,
    max_new_tokens,
    processors,
):
    model = shared_model(family, model_seed)
    prompt = make_prompt(prompt_length, prompt_seed)
    kwargs = {
        "prompt": torch.nn.functional.pad(prompt, (num_padding, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(prompt), (num_padding, 0)),
        "max_new_tokens": max_new_tokens,
        **processors,
    }
    fields = {"density": density, "kernel_size": kernel_size, "draft_confidence": draft_confidence}
    with make_twin(model, method, **fields) as sparse:
        assert generate(model, assistant_model=sparse, **kwargs).tolist() == generate(model, **kwargs).tolist()
