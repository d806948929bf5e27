"""Products that read some rows of a weight alone, in place."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_sirius.kernels import cpu
from hf_sirius.weights.formats import draft_linear
from hf_sirius.weights.linear import read_rows


needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@needs_numba
@settings(deadline=None)
@torch.no_grad()
@given(
    in_features=st.integers(1, 90), out_features=st.integers(1, 40), num_tokens=st.integers(1, 4),
    dtype=st.sampled_from(list(TOLERANCES)), draft_dtype=st.sampled_from([None, "bfloat16", "int8"]),
    bias=st.booleans(), seed=st.integers(0, 2**31), data=st.data(),
)  # fmt: skip
def test_the_rows_that_are_read_are_the_layers_own(
    in_features, out_features, num_tokens, dtype, draft_dtype, bias, seed, data
):
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    module = linear if draft_dtype is None else draft_linear(linear, draft_dtype)
    inputs = torch.randn(1, num_tokens, in_features, dtype=dtype)
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, out_features - 1)), label="rows")), dtype=torch.long)
    if draft_dtype is None:
        right = inputs.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    else:
        right = module(inputs)
    for chosen in (rows, None):
        outputs = read_rows(module, inputs, chosen)
        assert outputs.dtype == dtype and outputs.shape == (1, num_tokens, out_features)
        wrong = (outputs - right).double()
        wrong = wrong if chosen is None else wrong[..., chosen]
        assert wrong.norm() <= TOLERANCES[dtype] * (1 + right.double().norm())


@needs_numba
@torch.no_grad()
@pytest.mark.parametrize("draft_dtype", [None, "bfloat16", "int8"])
def test_other_rows_are_not_read(draft_dtype):
    linear = nn.Linear(64, 6, bias=False)
    module = linear if draft_dtype is None else draft_linear(linear, draft_dtype)
    inputs, rows = torch.randn(1, 1, 64), torch.tensor([1, 4])
    right = read_rows(module, inputs, rows)
    weight = linear.weight if draft_dtype is None else module.linear.weight
    weight.data[[0, 2, 3, 5]] = 77
    assert torch.equal(read_rows(module, inputs, rows), right)
    weight.data[1] = 77
    assert not torch.equal(read_rows(module, inputs, rows), right)


@pytest.mark.parametrize(
    "case",
    ["many tokens", "another dtype", "a view", "float64", "a hook", "a forward of its own", "gradients", "no numba"],
)
def test_where_no_kernel_reads_rows(case, monkeypatch):
    linear, inputs = nn.Linear(8, 6), torch.randn(1, 5 if case == "many tokens" else 1, 8)
    if case == "another dtype":
        inputs = inputs.bfloat16()
    if case == "a view":
        linear.weight.data = torch.randn(8, 6).T
    if case == "float64":
        linear, inputs = linear.double(), inputs.double()
    if case == "a hook":
        linear.register_forward_hook(lambda *_: None)
    if case == "a forward of its own":
        linear.forward = linear.forward
    if case == "no numba":
        monkeypatch.setattr(cpu, "is_available", lambda: False)
    with torch.set_grad_enabled(case == "gradients"):
        assert read_rows(linear, inputs, torch.tensor([2])) is None
