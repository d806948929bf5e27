"""Whatever a call carries, its output is the dense model's, or it is refused before the first token."""

import copy
import re
import types

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tiny import SLIDING, VOCAB_SIZE, build_model, make_prompt, shared_model
from transformers import DynamicCache, LogitsProcessor, StaticCache
from transformers.cache_utils import DynamicLayer

from hf_sirius import make_sparse


FAMILIES = ("llama", "phi3", "gpt2", "opt", *SLIDING)
NUM_POSITIONS = 24
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 20,
    "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 2.5, 3.0],
}  # fmt: skip
# Models whose positions end, or are encoded anew, while a call writes.
LIMITED = {
    "gpt2": {"max_position_embeddings": NUM_POSITIONS},
    "opt": {"max_position_embeddings": NUM_POSITIONS},
    "llama": {"rope_parameters": LONG_ROPE, "max_position_embeddings": 96},
}


REFUSED = (
    "a padded attention_mask of|token_type_ids of|the KV-cache holds .* tokens|has layers of a class of its own|"
    "not supported with Static cache"
)


class Cast(LogitsProcessor):
    """Returns scores of another dtype."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, input_ids, scores):
        return scores.to(self.dtype)


class Forbid(LogitsProcessor):
    """Forbids the token that came last, and every third one."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, ::3] = -torch.inf
        return scores.scatter(-1, input_ids[:, -1:], -torch.inf) if input_ids.shape[1] else scores


PROCESSORS = {
    "none": list,
    "float64": lambda: [Cast(torch.float64)],
    "bfloat16": lambda: [Cast(torch.bfloat16)],
    "forbids": lambda: [Forbid()],
    "both": lambda: [Forbid(), Cast(torch.float64)],
}


class Drawn:
    """A model, a twin's fields, and a function that makes the arguments of one call, which may change them."""

    def __init__(self, model, fields: dict, inputs, told: dict):
        self.model, self.fields, self.inputs, self.told = model, fields, inputs, told

    def __repr__(self):
        return f"Drawn({self.fields} {self.told})"


class Evicting(DynamicLayer):
    """Keeps the last tokens alone."""

    def update(self, key_states, value_states, *args, **kwargs):
        states = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = (of_all[..., -6:, :] for of_all in states)
        return states


def evicting(config) -> DynamicCache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = Evicting
    return cache


CACHES = {
    "plain": lambda config: DynamicCache(),
    "turn before": lambda config: DynamicCache(),
    "of the model": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
    "evicting": evicting,
}


@st.composite
def calls(draw):
    family = draw(st.sampled_from(FAMILIES))
    is_limited = family in LIMITED and draw(st.booleans())
    model = build_model(family, **LIMITED[family]) if is_limited else shared_model(family)
    fields = {
        "method": draw(st.sampled_from(["griffin", "cats", "teal"])),
        "density": draw(st.sampled_from([0.5, 1.0])),
        "kernel_size": draw(st.sampled_from([2, 4, 9, "auto"])),
        "tree_width": draw(st.sampled_from([1, 1, 3])),
    }
    length = draw(st.integers(1, 14))
    prompt = make_prompt(length, seed=draw(st.integers(0, 3)))
    most = NUM_POSITIONS - length if is_limited and family != "llama" else 20
    options = {"max_new_tokens": draw(st.integers(1, most)), "do_sample": False, "pad_token_id": 0}

    mask = torch.ones_like(prompt)
    kind_of_mask = draw(st.sampled_from(["none", "ones", "padded", "holes"]))
    if kind_of_mask == "padded":
        mask[:, : draw(st.integers(0, length - 1))] = 0
    elif kind_of_mask == "holes":
        for place in draw(st.lists(st.integers(0, length - 1), max_size=4)):
            mask[:, place] = 0
        mask[:, -1] = 1
    if kind_of_mask != "none":
        options["attention_mask"] = mask

    kind_of_positions = draw(st.sampled_from(["none", "none", "shifted", "gaps"]))
    if family != "opt" and kind_of_positions != "none" and not is_limited:
        positions = torch.arange(length)[None]
        options["position_ids"] = positions + 3 if kind_of_positions == "shifted" else positions * 2
    if family == "gpt2" and draw(st.booleans()):
        options["token_type_ids"] = torch.ones_like(prompt)

    num_cached = draw(st.sampled_from([0, 0, 1, length // 2, length - 1, length]))
    kind_of_cache = draw(st.sampled_from(["none", "plain", "of the model", "turn before", "static", "evicting"]))
    kind_of_inputs = draw(st.sampled_from(["ids", "ids", "embeddings", "both", "new ids"]))
    if draw(st.booleans()):
        options["eos_token_id"] = draw(st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=4))
    if draw(st.booleans()):
        options["min_new_tokens"] = draw(st.integers(0, 8))
    if draw(st.booleans()) and fields["tree_width"] == 1:
        options["prompt_lookup_num_tokens"] = draw(st.integers(1, 5))
    processors = draw(st.sampled_from(sorted(PROCESSORS)))

    def inputs() -> dict:
        made = dict(options, logits_processor=PROCESSORS[processors]())
        if kind_of_inputs != "embeddings":
            made["input_ids"] = prompt
        if kind_of_inputs in ("embeddings", "both"):
            made["inputs_embeds"] = model.get_input_embeddings()(prompt).detach()
        if kind_of_cache != "none":
            cache = CACHES[kind_of_cache](model.config)
            if kind_of_cache == "turn before" and num_cached > 1:
                turn = model.generate(
                    prompt[:, :1], past_key_values=cache, max_new_tokens=num_cached, return_dict_in_generate=True
                )
                cache = turn.past_key_values
                if "input_ids" in made:
                    made["input_ids"] = torch.cat([turn.sequences[:, :num_cached], prompt[:, num_cached:]], dim=-1)
            elif num_cached:
                with torch.no_grad():
                    model(prompt[:, :num_cached], attention_mask=mask[:, :num_cached], past_key_values=cache)
            made["past_key_values"] = cache
            if kind_of_inputs == "new ids" and 0 < cache.get_seq_length() < length:
                made["input_ids"] = made["input_ids"][:, cache.get_seq_length() :]
        return made

    told = {"family": family, "is_limited": is_limited, "prompt": prompt.tolist(), **options}
    told |= {"inputs": kind_of_inputs, "cache": kind_of_cache, "num_cached": num_cached, "processors": processors}
    return Drawn(model, fields, inputs, told)


def check_call(drawn: Drawn) -> None:
    model, fields, inputs = drawn.model, drawn.fields, drawn.inputs
    try:
        expected = model.generate(**inputs() | {"prompt_lookup_num_tokens": None})
    except Exception as error:  # what plain generate does not take either
        event(f"dense {type(error).__name__}")
        return
    written = []
    streamer = types.SimpleNamespace(put=lambda ids: written.append(copy.copy(ids)), end=lambda: None)
    with make_sparse(model, threshold=1.0, **fields) as sparse:
        try:
            output = model.generate(**inputs(), assistant_model=sparse, streamer=streamer)
        except ValueError as error:
            event("refused")
            assert re.search(REFUSED, str(error)), "for no reason"
            assert len(written) <= 1, "refused behind the first token"
            return
    event("compared")
    assert output.tolist() == expected.tolist()


@given(calls())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_a_call_carries(drawn):
    check_call(drawn)


@pytest.mark.slow
@given(calls())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_many_calls_carry(drawn):
    check_call(drawn)
