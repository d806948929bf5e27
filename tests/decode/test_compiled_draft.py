"""`compile_draft`: the draft step as one graph. The same drafts, for any length of the context, compiled once."""

import functools
import gc
import logging
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model, make_prompt
from torch._dynamo.utils import counters

from hf_sirius import make_sparse
from hf_sirius.draft import compiled


FIELDS = {"density": 1.0, "threshold": 1.0, "kernel_size": 5}
FAMILIES = ("gpt2", "mistral", "gemma2", "gemma3_text")
DRAFTS = {
    "whole": {"density": 1.0},
    "griffin": {"method": "griffin", "density": 0.4},
    "griffin int4": {"method": "griffin", "density": 0.4, "draft_dtype": "int4"},
    "int8 shortlist": {"density": 1.0, "draft_dtype": "int8", "draft_head": "shortlist"},
}
OPTIONS = {"do_sample": False, "max_new_tokens": 30}
_compile = torch.compile


@pytest.fixture(autouse=True)
def compiler(request, monkeypatch):
    """Runs graphs as they were traced, which takes a second; inductor, of which a test or two makes sure, takes ten."""
    torch._dynamo.reset()
    counters.clear()
    backend = "inductor" if request.node.get_closest_marker("slow") else "aot_eager"
    monkeypatch.setattr(torch, "compile", functools.partial(_compile, backend=backend))
    monkeypatch.setattr(compiled, "tqdm", functools.partial(compiled.tqdm, disable=True))


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def generate(model, twin=None, prompt=None, **options):
    return model.generate(make_prompt() if prompt is None else prompt, assistant_model=twin, **{**OPTIONS, **options})


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_sirius")]


def assert_compiled(twin):
    assert twin._twin.compiled.reason is None and num_graphs() == 1


@pytest.mark.parametrize(
    ("family", "draft"), [*(("llama", draft) for draft in DRAFTS), *((family, "int8 shortlist") for family in FAMILIES)]
)
def test_drafts_are_those_of_the_eager_twin(family, draft):
    model = build_model(family, dtype=torch.float64 if draft in ("whole", "griffin") else torch.float32)
    fields = {**FIELDS, **DRAFTS[draft]}
    with make_sparse(model, **fields) as eager, make_sparse(model, compile_draft=True, **fields) as twin:
        for length, max_new_tokens in ((11, 40), (3, 5), (40, 100)):  # beyond windows and beyond room
            prompt = make_prompt(length, seed=length)
            outputs = [generate(model, t, prompt, max_new_tokens=max_new_tokens) for t in (None, eager, twin)]
            assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
            assert [cycle.drafted_ids for cycle in twin.stats.cycles] == [c.drafted_ids for c in eager.stats.cycles]
        assert_compiled(twin)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "draft"), [*(("llama", draft) for draft in DRAFTS), ("gemma3_text", "whole"), ("phi3", "griffin")]
)
def test_inductor_compiles_them(family, draft):
    model, fields = build_model(family, dtype=torch.float32), {**FIELDS, **DRAFTS[draft]}
    with make_sparse(model, **fields) as eager, make_sparse(model, compile_draft=True, **fields) as twin:
        for length in (11, 30):
            prompt = make_prompt(length, seed=length)
            expected = generate(model, prompt=prompt)
            assert torch.equal(generate(model, eager, prompt), expected)
            assert torch.equal(generate(model, twin, prompt), expected)
        # Fused, bfloat16 is rounded less often.
        assert twin.stats.total.num_accepted == pytest.approx(eager.stats.total.num_accepted, rel=0.1, abs=3)
        assert_compiled(twin)


@functools.cache
def model_and_twin(family: str, draft: str):
    model = build_model(family)
    return model, make_sparse(model, compile_draft=True, **{**FIELDS, **DRAFTS[draft]})


@settings(max_examples=6, deadline=None)
@given(
    family=st.sampled_from(["llama", "mistral"]),
    draft=st.sampled_from(["whole", "griffin"]),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    max_new_tokens=st.integers(1, 20),
    seed=st.integers(0, 10**6),
)
def test_any_conversation_is_the_dense_models(family, draft, lengths, max_new_tokens, seed):
    model, twin = model_and_twin(family, draft)
    options = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    outputs = []
    for assistant in (None, twin):
        tokens, cache = make_prompt(lengths[0], seed), None
        for i, length in enumerate(lengths):
            turn = generate(model, assistant, tokens, past_key_values=cache, **options)
            cache = turn.past_key_values
            tokens = torch.cat([turn.sequences, make_prompt(length, seed + i)], dim=1)
        outputs.append(turn.sequences)
    assert torch.equal(*outputs)


def test_twins_of_the_same_draft_share_the_graph():
    model = build_model()
    expected = generate(model)
    for fields in ({}, {"kernel_size": 3}, {"threshold": 0.5}):
        twin = make_sparse(model, compile_draft=True, **{**FIELDS, **fields})
        generate(model, twin)
        assert_compiled(twin)
        del twin
        gc.collect()
    assert torch.equal(
        generate(model, make_sparse(model, compile_draft=True, **FIELDS)), expected
    )  # made inside the call
    assert num_graphs() == 1
    with make_sparse(model, compile_draft=True, **FIELDS, draft_dtype="int8") as other:
        generate(model, other)
    assert num_graphs() == 2


def test_a_twin_made_later_has_the_layers_of_then():
    model, fields = build_model(), {**FIELDS, "compile_draft": True}
    with make_sparse(model, **fields) as before:
        generate(model, before)
        model.model.layers[1].mlp = build_model(seed=1).model.layers[1].mlp
        with make_sparse(model, **fields) as twin:
            assert torch.equal(generate(model, twin), generate(model))
            assert twin.stats.acceptance_rate == 1


def test_what_is_cast_and_loaded_later_is_in_the_draft():
    model = build_model()
    with make_sparse(model, **FIELDS, compile_draft=True) as twin:
        generate(model, twin)
        model.load_state_dict(build_model(seed=1).state_dict())
        assert torch.equal(generate(model, twin), generate(model)) and twin.stats.acceptance_rate == 1
        assert num_graphs() == 1
        model.to(torch.float32)
        generate(model, twin)
        assert twin.stats.acceptance_rate == 1 and twin._twin.compiled.reason is None
        with torch.inference_mode():
            generate(model, twin)
        assert twin.stats.acceptance_rate == 1 and twin._twin.compiled.reason is None


def test_a_call_beside_another_one_drafts_eagerly():
    model = build_model()
    with make_sparse(model, **FIELDS, compile_draft=True) as twin:
        prompts = [make_prompt(seed=seed) for seed in range(4)]
        expected = [generate(model, prompt=prompt) for prompt in prompts]
        generate(model, twin)
        outputs = [None] * len(prompts)

        def run(i):
            for _ in range(3):
                outputs[i] = generate(model, twin, prompts[i])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(map(torch.equal, outputs, expected))
        assert_compiled(twin)
        with twin._twin.compiled.running({}) as is_free, twin._twin.compiled.running({}) as is_free_too:
            assert is_free and not is_free_too


def test_what_cannot_be_compiled_runs_eagerly_and_is_told(monkeypatch, caplog):
    model = build_model()
    expected = generate(model)
    with make_sparse(model, **FIELDS, compile_draft=True) as twin, caplog.at_level(logging.WARNING, "hf_sirius"):
        monkeypatch.setattr(twin._twin.compiled, "_step", lambda *args: 1 / 0)
        for _ in range(2):
            assert torch.equal(generate(model, twin), expected)
            assert twin.stats.num_accepted
        (message,) = told(caplog)
        assert "drafts run eagerly: ZeroDivisionError: division by zero" in message


@pytest.mark.parametrize(
    ("reason", "prepare", "options"),
    [
        ("the prompt is padded", lambda model: None, {"attention_mask": torch.tensor([[0, 0] + [1] * 9])}),
        ("the model is in training", lambda model: model.train(), {}),
        ("layers of type DynamicLayer", lambda model: model.compile(backend="eager"), {}),
    ],
)
def test_calls_that_the_graph_does_not_take_draft_eagerly(reason, prepare, options, caplog):
    model = build_model()
    prepare(model)
    expected = generate(model, **options)
    with make_sparse(model, **FIELDS, compile_draft=True) as twin, caplog.at_level(logging.WARNING, "hf_sirius"):
        assert torch.equal(generate(model, twin, **options), expected)
        assert twin.stats.acceptance_rate == 1
        assert [reason in message for message in told(caplog)] == [True]


def test_nothing_is_left_of_a_call_or_a_model():
    model = build_model()
    twin = make_sparse(model, method="griffin", density=0.4, kernel_size=4, compile_draft=True)
    generate(model, twin)
    assert all(owner._modules[name] is None for owner, name, _ in twin._twin.compiled._places)
    gone = [weakref.ref(thing) for thing in (model, model.model.layers[0], twin._twin.compiled)]
    del model, twin
    gc.collect()
    assert [thing() for thing in gone] == [None, None, None]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "griffin", "tree_width": 2}, "tree_width is 2"),
        ({"method": "cats"}, "method='cats' at a density of 0.5 chooses anew for every token"),
        ({"method": "teal", "density": 0.3}, "method='teal' at a density of 0.3"),
    ],
)
def test_drafts_that_are_not_compiled_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        make_sparse(build_model(), compile_draft=True, **fields)


def test_a_model_that_transformers_cannot_compile_is_refused(monkeypatch):
    model = build_model()
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    with pytest.raises(ValueError, match="cannot compile a LlamaForCausalLM"):
        make_sparse(model, compile_draft=True, **FIELDS)
