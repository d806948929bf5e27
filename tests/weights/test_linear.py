"""Products by a kernel: of some rows of a weight alone, and of a few tokens where that is faster."""

import contextlib
import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model
from torch import nn

from hf_sirius import make_sparse
from hf_sirius.kernels import cpu
from hf_sirius.weights.formats import draft_linear
from hf_sirius.weights.linear import is_kernel_faster, kernel_products, read_needed, run


needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@needs_numba
@torch.no_grad()
@settings(deadline=None)
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
    drawn = st.lists(st.booleans(), min_size=out_features, max_size=out_features)
    is_needed = torch.tensor(data.draw(drawn, label="is_needed"))
    if draft_dtype is None:
        right = inputs.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    else:
        right = module(inputs)
    outputs = read_needed(module, inputs, is_needed)
    assert outputs.dtype == dtype and outputs.shape == (1, num_tokens, out_features)
    tolerance = TOLERANCES[torch.bfloat16 if draft_dtype == "bfloat16" else dtype]
    assert (outputs - right)[..., is_needed].double().norm() <= tolerance * (1 + right.double().norm())


@needs_numba
@torch.no_grad()
@pytest.mark.parametrize("draft_dtype", [None, "bfloat16", "int8"])
def test_other_rows_are_not_read(draft_dtype):
    linear = nn.Linear(64, 6, bias=False)
    module = linear if draft_dtype is None else draft_linear(linear, draft_dtype)
    inputs, is_needed = torch.randn(1, 1, 64), torch.tensor([False, True, False, False, True, False])
    right = read_needed(module, inputs, is_needed)
    weight = linear.weight if draft_dtype is None else module.linear.weight
    weight.data[[0, 2, 3, 5]] = 77
    assert torch.equal(read_needed(module, inputs, is_needed), right)
    weight.data[1] = 77
    assert not torch.equal(read_needed(module, inputs, is_needed), right)


@torch.no_grad()
def test_inputs_go_to_the_device_of_the_weight():
    """As accelerate's hook sends them to a dense layer, behind which the outputs stay where they are."""
    linear = draft_linear(nn.Linear(8, 6, device="meta"), "bfloat16")
    outputs = linear(torch.randn(1, 1, 8))
    assert (outputs.device.type, outputs.dtype, outputs.shape) == ("meta", torch.float32, (1, 1, 6))


CASES = ["another dtype", "a view", "float64", "a hook", "a forward of its own", "gradients", "autocast", "no tokens",
         "no numba"]  # fmt: skip


@pytest.fixture
def kernels(monkeypatch):
    """Has every kernel be taken, and tells which layers' weights were read by one."""
    read, product = [], cpu.product
    monkeypatch.setattr(cpu, "is_faster", lambda dtype, num_tokens: dtype in cpu.DTYPES and cpu.is_available())
    monkeypatch.setattr("hf_sirius.weights.linear._MIN_PRODUCTS", 0)
    monkeypatch.setattr(
        cpu, "product", lambda inputs, weight, rows: read.append(weight) or product(inputs, weight, rows)
    )
    return read


def in_case(case, monkeypatch, linear, inputs):
    """Returns a layer, inputs and a context in which no kernel is to be taken, and the class that says so."""
    if case == "another dtype":
        inputs = inputs.bfloat16()
        linear.weight.data = linear.weight.data.half()
    if case == "a view":
        linear.weight.data = torch.randn(8, 6).T
    if case == "float64":
        linear, inputs = linear.double(), inputs.double()
    if case == "a hook":
        linear.register_forward_hook(lambda *_: None)
    if case == "a forward of its own":
        linear.forward = linear.forward
    if case == "no tokens":
        inputs = inputs[:, :0]
    if case == "no numba":
        monkeypatch.setattr(cpu, "is_available", lambda: False)
    around = contextlib.ExitStack()
    around.enter_context(torch.set_grad_enabled(case == "gradients"))
    if case == "autocast":
        around.enter_context(torch.autocast("cpu", torch.bfloat16))
    return linear, inputs, around


@pytest.mark.parametrize("case", [*CASES, "many tokens"])
def test_where_no_kernel_reads_rows(case, monkeypatch):
    linear, inputs = nn.Linear(8, 6), torch.randn(1, 5 if case == "many tokens" else 1, 8)
    linear, inputs, around = in_case(case, monkeypatch, linear, inputs)
    with around:
        assert read_needed(linear, inputs, torch.ones(6, dtype=torch.bool)) is None


@pytest.mark.parametrize("case", [case for case in CASES if case != "another dtype"])
def test_where_no_kernel_takes_a_product(case, monkeypatch, kernels):
    linear, inputs, around = in_case(case, monkeypatch, nn.Linear(8, 6), torch.randn(1, 1, 8))
    with around:
        assert torch.equal(run(linear, inputs), linear(inputs))
        if case != "a hook":  # which a verification's layers run, around the kernel
            with kernel_products([linear]):
                assert torch.equal(linear(inputs), nn.functional.linear(inputs, linear.weight, linear.bias))
    assert not kernels


@needs_numba
@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("num_tokens", [1, 5, 16])
def test_the_layers_of_a_verification_take_kernels_and_keep_nothing(dtype, num_tokens, kernels):
    linear, inputs, seen = nn.Linear(70, 9, dtype=dtype), torch.randn(1, num_tokens, 70, dtype=dtype), []
    linear.register_forward_hook(lambda _, args, output: seen.append(output))
    right = linear(inputs)
    before = dict(vars(linear))
    with pytest.raises(KeyError), kernel_products([linear]):
        outputs = linear(inputs)
        raise KeyError
    assert vars(linear) == before
    assert kernels == [linear.weight] and len(seen) == 2
    assert outputs.dtype == dtype and (outputs - right).double().norm() <= TOLERANCES[dtype] * right.double().norm()


@needs_numba
def test_nothing_lies_over_layers_where_no_kernel_is_faster(monkeypatch):
    monkeypatch.setattr(cpu, "is_faster", lambda dtype, num_tokens: num_tokens == 4)
    linear = nn.Linear(512, 512)
    assert is_kernel_faster([linear], 4)
    assert not is_kernel_faster([linear], 5) and not is_kernel_faster([nn.Linear(8, 8)], 4)
    model = build_model(dtype=torch.float32, hidden_size=512)
    with make_sparse(model, method="griffin") as twin, twin.new_call() as call:
        for num_tokens in (3, 4):
            with call.draft.verifying(num_tokens):
                assert any("forward" in vars(layer) for layer in twin._twin.linears) == (num_tokens == 4)


@needs_numba
@torch.no_grad()
def test_verifications_in_several_threads_leave_nothing(kernels):
    linear, inputs = nn.Linear(64, 8), torch.randn(1, 3, 64)
    right, wrong, barrier = linear(inputs), [], threading.Barrier(4)

    @torch.no_grad()  # which each thread has for itself
    def verify():
        barrier.wait()
        for _ in range(50):
            with kernel_products([linear]):
                outputs = linear(inputs)
            if (outputs - right).norm() > 1e-5 * right.norm():
                wrong.append(outputs)

    with ThreadPoolExecutor(4) as pool:
        for thread in [pool.submit(verify) for _ in range(4)]:
            thread.result()
    assert not wrong and "forward" not in vars(linear) and len(kernels) == 200
