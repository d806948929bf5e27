"""Products of a draft with the same inputs, which one call of a kernel makes."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model, make_prompt
from torch import nn

from hf_sirius import make_sparse
from hf_sirius.kernels import cpu
from hf_sirius.weights import packed
from hf_sirius.weights.formats import draft_linear
from hf_sirius.weights.joint import JointProducts


FORMATS = ("int8", "int4", "bfloat16")


@pytest.fixture
def calls(monkeypatch):
    """The numbers of products that each call of a kernel for packed weights made."""
    pytest.importorskip("numba")
    found, call = [], cpu.Products.__call__

    def counted(self, inputs, rows=None):
        if self._is_packed:
            found.append(len(self._weights))
        return call(self, inputs, rows)

    monkeypatch.setattr(cpu.Products, "__call__", counted)
    monkeypatch.setattr(packed, "_is_int4_kernel_faster", lambda: True)
    return found


def make(out_features: int, in_features: int, draft_dtype: str, seed: int = 0):
    torch.manual_seed(seed)
    return draft_linear(nn.Linear(in_features, out_features, bias=seed % 2 == 1), draft_dtype)


@settings(deadline=None, max_examples=60)
@given(
    formats=st.lists(st.sampled_from(FORMATS), min_size=2, max_size=5),
    asked=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=30),
    sizes=st.sampled_from([(64,), (64, 128), (70, 64)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_outputs_are_what_each_makes_alone(formats, asked, sizes, dtype):
    """In whatever order layers are asked, of inputs that they have in common or not."""
    linears = [make(16 + i, sizes[i % len(sizes)], of, i) for i, of in enumerate(formats)]
    joint = JointProducts()
    inputs = {size: [torch.randn(1, 1 + i, size).to(dtype) for i in range(3)] for size in sizes}
    for which, of in asked:
        linear = linears[which % len(linears)]
        given_ = inputs[sizes[which % len(linears) % len(sizes)]][of]
        assert torch.equal(joint(linear, given_), linear(given_))


def test_layers_go_together_from_the_second_time_on(calls):
    q, k, v, o = (make(size, 64, "int4", seed) for seed, size in enumerate((32, 16, 16, 64)))
    joint = JointProducts()
    for expected in ([1, 1, 1, 1], [3, 1], [3, 1]):
        calls.clear()
        inputs, others = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
        for linear in (q, k, v):
            joint(linear, inputs)
        joint(o, others)
        assert calls == expected


def test_what_is_not_asked_for_is_made_in_vain_once(calls):
    q, k, v = (make(16, 64, "int8", seed) for seed in range(3))
    joint = JointProducts()
    steps = ((q, k, v), [1, 1, 1]), ((q, k), [3]), ((q, k), [2]), ((q, k, v), [2, 1]), ((q, k, v), [2, 1])
    for asked, expected in steps:
        calls.clear()
        inputs = torch.randn(1, 1, 64)
        for linear in asked:
            joint(linear, inputs)
        joint.clear()  # a draft ends
        assert calls == expected


def test_a_layer_that_is_asked_twice_with_others_once(calls):
    a, b = make(16, 64, "int8", 0), make(16, 64, "int8", 1)
    joint = JointProducts()
    for expected in ([1, 1, 2], [1, 1, 1], [1, 1, 1]):
        inputs, others = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
        asked = (a, inputs), (b, inputs), (a, others)
        right = [linear(given_) for linear, given_ in asked]
        calls.clear()
        assert all(torch.equal(joint(*each), outputs) for each, outputs in zip(asked, right, strict=True))
        assert calls == expected


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_that_change_in_place(mode):
    """Of inference mode nothing tells of it."""
    a, b = make(16, 64, "int8", 0), make(16, 64, "int8", 1)
    joint = JointProducts()
    with mode():
        for _ in range(4):
            inputs = torch.randn(1, 1, 64)
            joint(a, inputs)
            if mode is torch.no_grad:
                inputs.mul_(2)
            assert torch.equal(joint(b, inputs), b(inputs))


def test_an_earlier_choice_of_neurons_is_let_go_of():
    pytest.importorskip("numba")
    model = build_model(dtype=torch.float32, hidden_size=64, intermediate_size=128)
    fields = {"method": "griffin", "density": 0.5, "draft_dtype": "int8", "threshold": 1.0, "kernel_size": 4}
    with make_sparse(model, reselect_every=1, **fields) as twin, twin.new_call() as call:
        known = set()
        for _ in range(3):
            with call.draft.observing(None):
                model(make_prompt())
            call.draft.select()
            with call.draft.drafting():
                twin(make_prompt()[:, :1])
            held = set(call.draft.held.values())
            known |= {weakref.ref(linear) for linear in held}
            assert {linear for group in call.draft._joint._groups.values() for linear in group.linears} <= held
            del held
        assert len([ref for ref in known if ref() is not None]) == len(call.draft.held)


@pytest.mark.parametrize("draft_dtype", ["int8", "int4"])
def test_a_draft_step_of_llama(calls, draft_dtype):
    """Four calls for a layer: queries, keys and values; what attention makes; gate and up; down."""
    model = build_model(dtype=torch.float32, num_hidden_layers=3, hidden_size=64, intermediate_size=128)
    twin = make_sparse(model, method="griffin", density=1.0, draft_dtype=draft_dtype, threshold=1.0, kernel_size=6)
    model.generate(make_prompt(), assistant_model=twin, max_new_tokens=30, min_new_tokens=30)
    step = [3, 1, 2, 1] * 3 + [1]  # and the head
    assert calls[-len(step) :] == step
