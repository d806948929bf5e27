"""Compiled models are full models like any other: their drafts are sparse, and their outputs stay what they are."""

import contextlib

import pytest
import torch
from tiny import METHODS, build_model, make_prompt

from hf_sirius import calibrate, make_sparse
from hf_sirius.model import observation


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Else one piece of code is compiled so often that torch gives up on it."""
    torch._dynamo.reset()


WAYS = {name: METHODS[name] for name in ("cats-threshold", "griffin")} | {
    "tree": {"method": "griffin", "tree_width": 3}
}
FIELDS = {"density": 0.1, "threshold": 1.0, "kernel_size": 5}


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def compile_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")


def compile_mlps(model):
    for layer in model.model.layers:
        layer.mlp.compile(backend="eager")


COMPILED = {
    "the model": lambda model: model.compile(backend="eager"),
    "its forward": compile_forward,
    "its decoder": lambda model: model.model.compile(backend="eager"),
    "its layers": compile_layers,
    "its MLPs": compile_mlps,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("what", "order"),
    [*((what, "compiled first") for what in COMPILED), ("the model", "used first"), ("its layers", "twin first")],
)
def test_drafts_are_those_of_the_model_as_it_was(what, way, order):
    model, prompt, options = build_model(), make_prompt(), {"max_new_tokens": 16, "do_sample": False}
    expected = model.generate(prompt, **options)
    with make_sparse(model, **WAYS[way], **FIELDS) as twin:
        model.generate(prompt, assistant_model=twin, **options)
        cycles, alone = twin.stats.cycles, twin.generate(prompt, **options)
    assert not torch.equal(alone, expected)
    twin = make_sparse(model, **WAYS[way], **FIELDS) if order == "twin first" else None
    COMPILED[what](model)
    if order == "used first":
        model.generate(prompt, **options)
    twin = twin or make_sparse(model, **WAYS[way], **FIELDS)
    for _ in range(2):
        assert torch.equal(model.generate(prompt, assistant_model=twin, **options), expected)
        assert twin.stats.cycles == cycles
    assert torch.equal(twin.generate(prompt, **options), alone)


def test_a_compiled_model_is_calibrated():
    texts = [{"input_ids": make_prompt()}]
    expected = calibrate(build_model(), None, texts, progress=False)
    model = build_model()
    model.model.compile(backend="eager")
    model(make_prompt())
    assert torch.equal(calibrate(model, None, texts, progress=False).table, expected.table)


def test_verifications_run_compiled():
    model, runs = build_model(), []

    def backend(graph, inputs):
        def run(*args):
            runs.append(None)
            return graph.forward(*args)

        return run

    model.model.compile(backend=backend)
    with make_sparse(model, method="griffin", **FIELDS) as twin:
        model.generate(make_prompt(), assistant_model=twin, max_new_tokens=16, do_sample=False)
    assert len(runs) >= twin.stats.num_cycles > 2


def test_an_mlp_that_hides_what_it_computes_is_told_with_its_name():
    model = build_model()
    mlp = model.model.layers[1].mlp

    def fused(self, x):  # as a kernel computes it, from the weights alone
        gate, up = x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T
        return (torch.nn.functional.silu(gate) * up) @ self.down_proj.weight.T

    mlp.forward = fused.__get__(mlp)
    with (
        make_sparse(model, method="griffin") as twin,
        pytest.raises(ValueError, match=r"seen of model\.layers\.1\.mlp"),
    ):
        model.generate(make_prompt(), assistant_model=twin, max_new_tokens=4)


def test_only_compiled_models_are_told_to_run_eagerly(monkeypatch):
    monkeypatch.setattr(observation.torch.compiler, "set_stance", None)
    with make_sparse(build_model()) as twin:
        twin.dense_model.generate(make_prompt(), assistant_model=twin, max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_whole_graph_stays_whole(way):
    """Neither hooks nor the room in the KV-cache break what was compiled."""
    model, prompt, options = build_model(), make_prompt(), {"max_new_tokens": 16, "do_sample": False}
    expected = model.generate(prompt, **options)
    model.compile(backend="eager", fullgraph=True)
    output = model.generate(prompt, assistant_model=make_sparse(model, **WAYS[way], **FIELDS), **options)
    assert torch.equal(output, expected)


def test_prefills_of_several_threads_leave_the_process_as_it_was():
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        for stack in (first, second):
            stack.enter_context(observation.eagerly())
        first.close()
        assert stance() == "force_eager"
        second.close()
    assert stance() == "default"


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance
