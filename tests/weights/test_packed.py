"""Weights of 4 and 8 bits: what their products are, what they take, and what becomes of odd sizes."""

import importlib.util
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model, make_prompt

from hf_sirius import make_sparse
from hf_sirius.kernels import cpu
from hf_sirius.weights import packed
from hf_sirius.weights.gather import Selection
from hf_sirius.weights.packed import int4_bytes, int4_linear, int8_bytes, int8_linear


@pytest.fixture(params=["numba", "numba, 4 bits by torch", "torch"])
def backend(request, monkeypatch):
    monkeypatch.setattr(packed, "_is_int4_kernel_faster", lambda: request.param == "numba")
    if request.param == "torch":
        monkeypatch.setattr(cpu, "is_available", lambda: False)
    elif importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")
    else:
        assert cpu.is_available()
    return request.param


def make_weight(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator)


def rows_of(linear, in_features: int) -> torch.Tensor:
    """Returns the weight that a product stands for, float32 [out_features, in_features]."""
    return linear(torch.eye(in_features)).T


sizes = st.tuples(st.integers(1, 150), st.integers(1, 150))


@settings(deadline=None, max_examples=40)
@given(size=sizes, seed=st.integers(0, 2**31), is_ours=st.booleans())
def test_values_are_right_to_half_a_step(size, seed, is_ours):
    weight = make_weight(*size, seed)
    scale = 1 / 127 / 2
    found = rows_of(int8_linear(Selection(weight), None), size[1])
    assert ((found - weight).abs() <= 1.01 * scale * weight.abs().amax(dim=1, keepdim=True) + 1e-2 * weight.abs()).all()
    with mock.patch.object(packed, "_is_int4_kernel_faster", lambda: is_ours):
        found, columns = rows_of(int4_linear(Selection(weight), None), size[1]), weight.abs().mean(dim=0)
    span = (weight / columns).abs().amax(dim=1, keepdim=True) * 2
    # Half a step of 15, and what bfloat16 loses of scales, zero points, columns and products.
    assert ((found - weight).abs() <= (span / 15 / 2 + 0.03 * span) * columns).all()


@settings(deadline=None, max_examples=25)
@given(size=sizes, has_bias=st.booleans(), make=st.sampled_from(["int8", "int4", "int4 by torch"]))
def test_the_bytes_are_told(size, has_bias, make):
    bias = torch.ones(size[0]) if has_bias else None
    source = Selection(make_weight(*size))
    with mock.patch.object(packed, "_is_int4_kernel_faster", lambda: make == "int4"):
        linear = int8_linear(source, bias) if make == "int8" else int4_linear(source, bias)
        told = int8_bytes(*size, has_bias) if make == "int8" else int4_bytes(*size, has_bias, source.weight.device)
    assert told == sum(parameter.nbytes for parameter in linear.parameters())


@pytest.mark.parametrize("make", [int8_linear, int4_linear])
def test_rows_and_columns_of_zeros(make, backend):
    weight = make_weight(9, 70)
    weight[2], weight[:, 5], weight[:, 64:] = 0, 0, 0
    inputs = make_weight(3, 70, seed=1)
    outputs = make(Selection(weight), None)(inputs)
    assert outputs.isfinite().all() and (outputs[:, 2] == 0).all()
    assert (outputs - inputs @ weight.T).norm() < 0.2 * (inputs @ weight.T).norm()


def test_large_columns_do_not_spoil_the_others_in_4_bits():
    """Channels of real models differ by factors, and a group shares a scale."""
    weight, inputs = make_weight(64, 64), make_weight(5, 64, seed=1)
    plain = int4_linear(Selection(weight), None)(inputs) - inputs @ weight.T
    factors = torch.ones(64).index_fill_(0, torch.arange(0, 64, 7), 8.0)
    scaled = int4_linear(Selection(weight * factors), None)(inputs / factors) - inputs @ weight.T
    assert scaled.norm() < 1.2 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [int8_linear, int4_linear])
def test_hidden_states_keep_their_dtype_and_shape(make, dtype, backend):
    linear = make(Selection(make_weight(10, 24)), torch.ones(10))
    outputs = linear(torch.zeros(2, 3, 24, dtype=dtype))
    assert outputs.dtype == dtype and outputs.shape == (2, 3, 10) and (outputs == 1).all()


@pytest.mark.parametrize("draft_dtype", ["int8", "int4"])
@pytest.mark.parametrize("fields", [{"density": 1.0}, {"method": "griffin"}, {"method": "cats"}, {"tree_width": 3}],
                         ids=["whole", "griffin", "cats", "tree"])  # fmt: skip
def test_the_output_is_the_models_own(draft_dtype, fields, backend):
    model = build_model()  # in float64
    expected = model.generate(make_prompt(), max_new_tokens=20, do_sample=False)
    with make_sparse(model, threshold=1.0, kernel_size=5, draft_dtype=draft_dtype, **fields) as twin:
        assert torch.equal(
            model.generate(make_prompt(), assistant_model=twin, max_new_tokens=20, do_sample=False), expected
        )
        assert twin.stats.num_drafted


def test_the_head_of_an_int4_draft_has_8_bits():
    model = build_model()
    with make_sparse(model, density=1.0, draft_dtype="int4") as twin:
        assert twin._twin.resident.pop(model.lm_head) == "int8"
        assert set(twin._twin.resident.values()) == {"int4"}


def test_another_twin_of_the_same_settings_adds_nothing():
    model = build_model()
    with (
        make_sparse(model, density=1.0, draft_dtype="int4") as twin,
        make_sparse(model, density=1.0, draft_dtype="int4", kernel_size=3) as other,
    ):
        assert twin._twin.kept.casts() == other._twin.kept.casts()
