"""`compile_draft`: the draft step and the verification as graphs. The same drafts and verdicts, for any length of the
context and any number of tokens, compiled once.
"""

import copy
import functools
import gc
import logging
import re
import threading
import time
import weakref

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import tiny_mixture
from tiny import build_model, make_prompt, slow
from torch._dynamo.utils import counters
from transformers import DynamicCache

from hf_sirius import make_sparse
from hf_sirius.draft.graph import Graph
from hf_sirius.kernels import cpu
from hf_sirius.model.compat import IS_5_17
from hf_sirius.sparsity.whole import Whole
from hf_sirius.weights import packed
from hf_sirius.weights.formats import draft_linear
from hf_sirius.weights.linear import plain_over


FIELDS = {"density": 1.0, "threshold": 1.0, "kernel_size": 5}
DRAFTS = {
    "whole": {"density": 1.0},
    "griffin": {"method": "griffin", "density": 0.4},
    "griffin int4": {"method": "griffin", "density": 0.4, "draft_dtype": "int4"},
    "int8 shortlist": {"density": 1.0, "draft_dtype": "int8", "draft_head": "shortlist"},
    "cats": {"method": "cats", "density": 0.5},
    "cats int8": {"method": "cats", "density": 0.4, "draft_dtype": "int8", "selection": "topk"},
    "teal": {"method": "teal", "density": 0.6, "weighting": "column"},
    "teal int8": {"method": "teal", "density": 0.7, "draft_dtype": "int8"},
}
OPTIONS = {"do_sample": False, "max_new_tokens": 30}
_compile = torch.compile


@pytest.fixture(autouse=True)
def compiler(request, monkeypatch):
    """Runs graphs as they were traced, which takes seconds; inductor, of which a test or two makes sure, takes more."""
    torch._dynamo.reset()
    counters.clear()
    backend = "inductor" if request.node.get_closest_marker("slow") else "eager"
    monkeypatch.setattr(torch, "compile", functools.partial(_compile, backend=backend))


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def generate(model, twin=None, prompt=None, **options):
    return model.generate(make_prompt() if prompt is None else prompt, assistant_model=twin, **{**OPTIONS, **options})


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_sirius")]


def assert_compiled(twin, num: int = 3):
    """A graph of the step, one of the verification of a token, and one of that of several."""
    step, verification = twin._twin.compiled, twin._twin.verification
    assert not step._told and not verification._told and num_graphs() == num
    assert step.graph.compiled_for and len(verification.graph.compiled_for) >= 2
    assert twin.stats.total.num_compiled_steps > 0 and twin.stats.total.num_compiled_verifications > 0


@pytest.mark.parametrize(
    ("family", "draft"),
    [
        ("llama", "whole"),
        *(pytest.param("llama", draft, marks=pytest.mark.slow) for draft in DRAFTS if draft != "whole"),
        *(pytest.param(family, "int8 shortlist", marks=pytest.mark.slow) for family in ("gpt2", "gemma3_text")),
    ],
)
def test_drafts_are_those_of_the_eager_twin(family, draft):
    dtype = torch.float64 if draft in ("whole", "griffin", "cats", "teal") else torch.float32
    model = build_model(family, dtype=dtype)
    fields = {**FIELDS, **DRAFTS[draft]}
    with make_sparse(model, **fields) as eager, make_sparse(model, compile_draft=True, **fields) as twin:
        for length, max_new_tokens in ((1, 40), (11, 5), (40, 100)):  # beyond windows and beyond room
            prompt = make_prompt(length, seed=length)
            outputs = [generate(model, t, prompt, max_new_tokens=max_new_tokens) for t in (None, eager, twin)]
            assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
            (drafted, num_steps), expected = (
                ([cycle.drafted_ids for cycle in t.stats.cycles], t.stats.num_steps) for t in (twin, eager)
            )
            # Fused, an input may round to a neighbour of its 8 bits, behind which other tokens come.
            assert drafted[0] == expected[0][0] if draft == "griffin int4" else (drafted, num_steps) == expected
            assert twin.stats.num_compiled_steps == twin.stats.num_steps > 0
            assert twin.stats.draft_density == pytest.approx(eager.stats.draft_density, rel=1e-3)
            assert twin.stats.not_compiled is eager.stats.not_compiled is None and not eager.stats.num_compiled_steps
            assert twin.stats.num_compiled_verifications == twin.stats.num_cycles
            assert not eager.stats.num_compiled_verifications
        assert_compiled(twin)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "draft"),
    [*(("llama", draft) for draft in DRAFTS), ("gemma2", "whole"), ("phi3", "griffin"), ("mistral", "int8 shortlist")],
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


@pytest.mark.slow
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
    total = twin.stats.total
    assert total.num_accepted == total.num_drafted or draft != "whole"
    assert not twin._twin.compiled._told


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
    assert num_graphs() == 3
    with make_sparse(model, compile_draft=True, **FIELDS, draft_dtype="int8") as other:
        generate(model, other)
    assert num_graphs() == 4  # one more step


def replace_a_layer(model):
    model.model.layers[1].mlp = build_model(seed=1).model.layers[1].mlp


def steer_a_projection(model):
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, args, output: output * 3)


def add_an_adapter(model):
    torch.manual_seed(0)
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False), model)


@pytest.mark.parametrize("change", [replace_a_layer, *slow(steer_a_projection, add_an_adapter)])
def test_a_twin_made_later_drafts_as_the_model_is_then(change):
    model, fields = build_model(), {**FIELDS, "compile_draft": True}
    with make_sparse(model, **fields) as before:
        generate(model, before)
        was = generate(model)
        change(model)
        with make_sparse(model, **fields) as twin:
            expected = generate(model)
            assert torch.equal(generate(model, twin), expected) and not torch.equal(expected, was)
            assert twin.stats.acceptance_rate == 1 and not twin._twin.compiled._told


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_without_the_models_windows_is_drafted_into_eagerly(family, caplog):
    model, options = build_model(family), {"max_new_tokens": 40}
    with make_sparse(model, **FIELDS, compile_draft=True) as twin, caplog.at_level(logging.WARNING, "hf_sirius"):
        expected = generate(model, past_key_values=DynamicCache(), **options)
        assert torch.equal(generate(model, twin, past_key_values=DynamicCache(), **options), expected)
        assert twin.stats.acceptance_rate == 1
        assert bool(told(caplog)) == (family == "mistral")


def test_a_copy_of_a_twin_has_a_step_of_its_own():
    model = build_model()
    with make_sparse(model, **FIELDS, compile_draft=True) as twin:
        generate(model, twin)
        clone = copy.deepcopy(twin)
        assert clone._twin.compiled._module is not twin._twin.compiled._module
        assert_compiled(twin)


@pytest.mark.slow
def test_what_compiling_takes_is_no_draft_steps(monkeypatch):
    class SlowGraph(Graph):
        def __init__(self, what):
            super().__init__(what)
            run, self._run = self._run, lambda *inputs: (self.compiled_for or time.sleep(1), run(*inputs))[-1]

    monkeypatch.setattr("hf_sirius.draft.twin.Graph", SlowGraph)
    model = build_model()
    with make_sparse(model, **{**FIELDS, "kernel_size": "auto"}, compile_draft=True) as twin:
        generate(model, twin)
        for user in (twin._twin.compiled, twin._twin.verification):
            assert user.graph.compile_seconds > 1
        assert max(cycle.draft_seconds + cycle.verification_seconds for cycle in twin.stats.cycles) < 1


def test_states_asked_for_are_the_full_models():
    model, options = build_model(), {"output_hidden_states": True, "return_dict_in_generate": True}
    expected = generate(model, **options)
    with make_sparse(model, **FIELDS, compile_draft=True) as twin:
        output = generate(model, twin, **options)
        assert torch.equal(output.sequences, expected.sequences) and output.hidden_states
        assert twin.stats.num_compiled_steps and not twin.stats.num_compiled_verifications
        generate(model, twin)
        assert twin.stats.num_compiled_verifications == twin.stats.num_cycles


@pytest.mark.parametrize("with_numba", [True, False])
@pytest.mark.parametrize("draft_dtype", [None, "int8", "int4"])
def test_weights_are_read_by_kernels(draft_dtype, with_numba, monkeypatch):
    """Of sizes for which they are made: tiny models have none."""
    if not with_numba:
        monkeypatch.setattr(cpu, "is_available", lambda: False)
    monkeypatch.setattr(packed, "_is_int4_kernel_faster", lambda: True)
    linear, inputs, graphs = torch.nn.Linear(512, 1024), torch.randn(1, 1, 512), []
    layer = plain_over(linear) if draft_dtype is None else draft_linear(linear, draft_dtype)
    with torch.no_grad():
        step = _compile(layer.forward, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
        torch.testing.assert_close(step(inputs), layer(inputs))
        called = [str(node.target) for node in graphs[0].graph.nodes]
        assert any(name.startswith("hf_sirius") for name in called) == cpu.is_available()
        if cpu.is_available():
            is_needed = torch.arange(1024) % 3 == 0
            torch.testing.assert_close(step(inputs, is_needed), layer(inputs, is_needed))
            assert not torch.equal(step(inputs, is_needed), layer(inputs)), "rows that are not needed were read"


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        pytest.param(  # drops its KV-cache once
            *("phi3", {"original_max_position_embeddings": 20, "max_position_embeddings": 96}), marks=pytest.mark.slow
        ),
        ("gpt2", {"n_positions": 30}),  # the text ends where the table of positions does
    ],
)
def test_output_is_the_dense_models_to_the_last_position(family, fields):
    if IS_5_17 and family == "phi3":
        pytest.skip("there plain generate forgets what it has read")
    for max_new_tokens in (6, 19):
        expected = generate(build_model(family, **fields), max_new_tokens=max_new_tokens)
        model = build_model(family, **fields)
        with make_sparse(model, **FIELDS, compile_draft=True) as twin:
            assert torch.equal(generate(model, twin, max_new_tokens=max_new_tokens), expected)
            assert twin.stats.num_compiled_verifications


def test_a_graph_does_not_ask_how_many_tokens_a_kernel_reads():
    """Of a size from which on a kernel is taken for three tokens, and not for two."""
    layer, graphs = plain_over(torch.nn.Linear(576, 192)), []
    with torch.no_grad():
        step = _compile(layer.forward, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
        for num_tokens in (2, 3, 9):
            inputs = torch.randn(1, num_tokens, 576)
            torch._dynamo.mark_dynamic(inputs, 1)
            torch.testing.assert_close(step(inputs), layer(inputs))
    assert len(graphs) == 1


@pytest.mark.slow
def test_what_is_cast_and_loaded_later_is_in_the_draft():
    model = build_model()
    with make_sparse(model, **FIELDS, compile_draft=True) as twin:
        generate(model, twin)
        model.load_state_dict(build_model(seed=1).state_dict())
        assert torch.equal(generate(model, twin), generate(model)) and twin.stats.acceptance_rate == 1
        assert num_graphs() == 3
        model.to(torch.float32)
        generate(model, twin)
        assert twin.stats.acceptance_rate == 1 and not twin._twin.compiled._told
        with torch.inference_mode():
            generate(model, twin)
        assert twin.stats.acceptance_rate == 1 and not twin._twin.compiled._told


@pytest.mark.slow
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
        assert twin.stats.total.acceptance_rate == 1
        assert_compiled(twin)
        running = functools.partial(twin._twin.compiled.running, {}, Whole(twin.sirius_config, []), torch.device("cpu"))
        with running() as reason, running() as reason_of_other:
            assert reason is None and reason_of_other == "another call of the twin uses the graph"


def test_what_cannot_be_compiled_runs_eagerly_and_is_told(monkeypatch, caplog):
    model = build_model()
    expected = generate(model)
    with make_sparse(model, **FIELDS, compile_draft=True) as twin, caplog.at_level(logging.WARNING, "hf_sirius"):
        for user in (twin._twin.compiled, twin._twin.verification):
            monkeypatch.setattr(user.graph, "_run", lambda *args: 1 / 0)
        padded = {"attention_mask": torch.tensor([[0] + [1] * 10])}
        generate(model, twin, **padded)
        assert twin.stats.not_compiled == "the prompt is padded"
        for _ in range(2):
            assert torch.equal(generate(model, twin), expected)
            assert twin.stats.num_accepted and not twin.stats.num_compiled_steps
            assert "ZeroDivisionError" in twin.stats.not_compiled and "ZeroDivisionError" in str(twin.stats)
            assert not twin.stats.num_compiled_verifications
        messages = told(caplog)
        assert len(messages) == 4 and all("runs eagerly" in message for message in messages)
        for words in ("the prompt is padded", "ZeroDivisionError: division"):
            assert sum(words in message for message in messages) == 2  # of the step, and of the verification


@pytest.mark.parametrize(
    ("reason", "prepare", "options"),
    [
        ("the prompt is padded", lambda model: None, {"attention_mask": torch.tensor([[0, 0] + [1] * 9])}),
        ("the model is in training", lambda model: model.train(), {}),
        ("the model itself is compiled", lambda model: model.model.layers[0].mlp.compile(backend="eager"), {}),
    ],
)
def test_calls_that_the_graph_does_not_take_draft_eagerly(reason, prepare, options, caplog):
    model = build_model()
    prepare(model)
    expected = generate(model, **options)
    with make_sparse(model, **FIELDS, compile_draft=True) as twin, caplog.at_level(logging.WARNING, "hf_sirius"):
        assert torch.equal(generate(model, twin, **options), expected)
        assert twin.stats.acceptance_rate == 1
        assert [reason in message for message in told(caplog)] == [True, True]  # of the step, and of the verification
        assert not twin.stats.num_compiled_verifications
        assert reason in twin.stats.not_compiled and f"0 of {twin.stats.num_steps} draft steps" in str(twin.stats)


@pytest.mark.parametrize(
    ("family", "draft"),
    [
        ("llama", "whole"),
        ("llama", "griffin"),
        *(pytest.param("llama", draft, marks=pytest.mark.slow) for draft in ("griffin int4", "int8")),
        *(pytest.param(family, "int8", marks=pytest.mark.slow) for family in ("gpt2", "gemma3_text")),
    ],
)
def test_the_draft_of_an_offloaded_model_is_compiled(family, draft, tmp_path):
    dtype = torch.float64 if draft in ("whole", "griffin", "cats", "teal") else torch.float32
    model = build_model(family, dtype=dtype)
    prompts = [make_prompt(length, seed=length) for length in (11, 30)]
    expected = [generate(model, prompt=prompt) for prompt in prompts]
    disk_offload(model, str(tmp_path))
    # A shortlist wants the head in memory.
    fields = {**FIELDS, **({"draft_dtype": "int8"} if draft == "int8" else DRAFTS[draft])}
    with make_sparse(model, **fields) as eager, make_sparse(model, compile_draft=True, **fields) as twin:
        for i in (0, 1, 0):
            for each in (eager, twin):
                assert torch.equal(generate(model, each, prompts[i]), expected[i])
            drafted, eagerly = ([cycle.drafted_ids for cycle in each.stats.cycles] for each in (twin, eager))
            assert drafted[0] == eagerly[0] and (draft == "griffin int4" or drafted == eagerly)
            assert twin.stats.num_compiled_steps == twin.stats.num_steps > 0
            assert twin.stats.not_compiled is None and not twin.stats.num_compiled_verifications
            assert num_graphs() == 1
        assert all(parameter.is_meta for parameter in model.parameters())


def test_a_draft_that_is_streamed_in_part_runs_eagerly(caplog):
    model = build_model()
    expected = generate(model)
    cpu_offload(model)
    fields = {**FIELDS, "density": 0.4, "method": "griffin", "compile_draft": True}
    with pytest.raises(ValueError, match="too small for any draft") as error:
        make_sparse(model, **fields, draft_memory=1)
    needed = int(re.search(r"need (\d+) bytes", str(error.value))[1])
    with make_sparse(model, **fields, draft_memory=needed) as twin, caplog.at_level(logging.WARNING, "hf_sirius"):
        for _ in range(2):
            assert torch.equal(generate(model, twin), expected)
            assert "draft_memory is too small" in twin.stats.not_compiled and not twin.stats.num_compiled_steps
        assert len(told(caplog)) == 1 and not num_graphs()


def test_what_another_hook_of_accelerate_does_is_not_left_out(caplog):
    model = build_model()
    expected = generate(model)
    add_hook_to_module(model.model.layers[0].mlp, ModelHook())
    with make_sparse(model, **FIELDS, compile_draft=True) as twin, caplog.at_level(logging.WARNING, "hf_sirius"):
        assert torch.equal(generate(model, twin), expected)
        assert "a hook of another kind" in twin.stats.not_compiled and not twin.stats.num_compiled_steps


@pytest.mark.parametrize("draft", ["whole", "cats"])
def test_a_model_that_is_dispatched_and_not_offloaded(draft):
    model = build_model(dtype=torch.float32)
    expected = generate(model)
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    with make_sparse(model, **{**FIELDS, **DRAFTS[draft]}, compile_draft=True) as twin:
        assert torch.equal(generate(model, twin), expected)
        assert twin.stats.num_compiled_steps == twin.stats.num_steps > 0


def test_what_an_offloaded_draft_holds_is_gone_with_its_call():
    model = build_model(dtype=torch.float32)
    expected = generate(model)
    cpu_offload(model)
    fields = {"method": "griffin", "density": 0.4, "threshold": 1.0, "kernel_size": 5}
    with make_sparse(model, compile_draft=True, **fields) as twin:
        assert torch.equal(generate(model, twin), expected)
        assert twin.stats.num_compiled_steps == twin.stats.num_steps > 0
        gc.collect()
        dense = set(model.modules())
        assert all(module in dense for module in twin._twin.compiled._plain)


def test_nothing_is_left_of_a_call_or_a_model():
    model = build_model()
    model.model.layers[0].register_forward_hook(functools.partial(lambda *args: None, model))  # which holds the model
    twin = make_sparse(model, method="griffin", density=0.4, kernel_size=4, compile_draft=True)
    generate(model, twin)
    assert all(owner._modules[name] is None for owner, name, _ in twin._twin.compiled._places)
    assert not twin.stats.num_compiled_verifications  # for which the hook would be lost
    gone = [weakref.ref(thing) for thing in (model, model.model.layers[0], twin._twin.compiled)]
    del model, twin
    gc.collect()
    assert [thing() for thing in gone] == [None, None, None]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "griffin", "tree_width": 2}, "tree_width is 2"),
        ({"method": "cats"}, "method='cats' at a density of 0.5 chooses anew for every token within experts"),
        ({"method": "teal", "density": 0.3}, "method='teal' at a density of 0.3"),
    ],
)
def test_drafts_that_are_not_compiled_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        make_sparse(tiny_mixture("mixtral"), compile_draft=True, **fields)


@pytest.mark.parametrize("draft", ["cats", "cats int8", "teal"])
def test_what_is_chosen_for_every_token_is_chosen_in_the_graph(draft):
    model, fields = build_model(dtype=torch.float32), {**FIELDS, **DRAFTS[draft]}
    with make_sparse(model, **fields) as eager, make_sparse(model, compile_draft=True, **fields) as twin:
        for seed in range(4):  # cutoffs follow from draft to draft
            prompt = make_prompt(9, seed=seed)
            outputs = [generate(model, t, prompt) for t in (None, eager, twin)]
            assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
            assert twin.stats.num_compiled_steps == twin.stats.num_steps > 0
            assert [c.drafted_ids for c in twin.stats.cycles] == [c.drafted_ids for c in eager.stats.cycles]
        assert twin.stats.total.draft_density == pytest.approx(eager.stats.total.draft_density, rel=1e-3)
        assert twin.stats.is_masking == eager.stats.is_masking == (draft == "teal" or not cpu.is_available())
        assert_compiled(twin)
        other = {**fields, "density": 0.7}
        with make_sparse(model, compile_draft=True, **other) as another, make_sparse(model, **other) as eager:
            for t in (another, eager):
                assert torch.equal(generate(model, t, prompt), outputs[0])
            assert another.stats.num_compiled_steps == another.stats.num_steps > 0
            assert [c.drafted_ids for c in another.stats.cycles] == [c.drafted_ids for c in eager.stats.cycles]


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_layouts_without_an_up_of_their_own_choose_in_the_graph(family):
    model, fields = build_model(family), {**FIELDS, **DRAFTS["cats"]}
    with make_sparse(model, compile_draft=True, **fields) as twin:
        assert torch.equal(generate(model, twin), generate(model))
        assert twin.stats.num_compiled_steps == twin.stats.num_steps > 0
        assert twin.stats.draft_density < 1


def test_a_model_that_transformers_cannot_compile_is_refused(monkeypatch):
    model = build_model()
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    with pytest.raises(ValueError, match="a step of LlamaForCausalLM cannot be compiled"):
        make_sparse(model, compile_draft=True, **FIELDS)
