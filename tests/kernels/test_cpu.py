"""The kernels that numba compiles, against the products of the weights that they stand for."""

import importlib.util
import os
import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sirius.kernels import cpu


# A kernel that does not compile is to fail here, though drafts do without it.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


def make(num_tokens: int, out_features: int, num_groups: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_tokens, 64 * num_groups, generator=generator)
    values = torch.randint(-127, 128, (out_features, 64 * num_groups), generator=generator, dtype=torch.int8)
    scales = torch.rand(out_features, num_groups, generator=generator)
    return inputs, values, scales


def expected(inputs, values, scales):
    return inputs.double() @ (values.double() * scales.double().repeat_interleave(64, dim=1)).T


def is_right(outputs, right, inputs, weight, rounded=None) -> bool:
    """Whether outputs differ by what rounding explains: of their terms, as sums may be near 0, of theirs, and maybe of
    inputs, to so many steps of the greatest of each 64.

    Args:
        rounded: the inputs and the weight of the product for which inputs are rounded, and the number of steps.
    """
    bounds = 1e-5 * (inputs.double().abs() @ weight.double().abs().T)
    if rounded is not None:
        inputs, weight, num_steps = rounded
        greatest = inputs.double().unflatten(-1, (-1, 64)).abs().amax(dim=-1).repeat_interleave(64, dim=1)
        bounds += 0.501 / num_steps * greatest @ weight.double().abs().T
    if outputs.dtype == torch.bfloat16:
        bounds += right.abs() * 2**-8 + bounds * 2**-8
    return bool(((outputs - right).abs() <= bounds).all())


@settings(deadline=None)
@given(
    num_tokens=st.integers(1, 9), out_features=st.integers(1, 40), in_features=st.integers(1, 200),
    input_dtype=st.sampled_from(cpu.DTYPES), dtype=st.sampled_from(cpu.DTYPES), num_threads=st.integers(1, 3),
    data=st.data(),
)  # fmt: skip
def test_products_of_some_rows(num_tokens, out_features, in_features, input_dtype, dtype, num_threads, data):
    generator = torch.Generator().manual_seed(out_features)
    inputs = torch.randn(num_tokens, in_features, generator=generator).to(input_dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    rows = data.draw(st.none() | st.lists(st.integers(0, out_features - 1), unique=True), label="rows")
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        outputs = cpu.product(inputs, weight, None if rows is None else torch.tensor(rows, dtype=torch.long))
    finally:
        torch.set_num_threads(before)
    right = inputs.double() @ weight.double().T
    if rows is not None:
        others = [row for row in range(out_features) if row not in rows]
        right[:, others] = 0
        assert not outputs[:, others].any()
    assert outputs.dtype == input_dtype and outputs.shape == right.shape
    assert is_right(outputs, right, inputs, weight)


@settings(deadline=None)
@given(
    num_tokens=st.integers(1, 9), out_features=st.integers(1, 40), num_groups=st.integers(1, 4),
    dtype=st.sampled_from(cpu.DTYPES), num_threads=st.integers(1, 3), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_grouped_products(num_tokens, out_features, num_groups, dtype, num_threads, seed):
    inputs, *packed = make(num_tokens, out_features, num_groups, seed)
    given_ = inputs.to(dtype), *packed
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        outputs = cpu.grouped_product(*given_)
    finally:
        torch.set_num_threads(before)
    right = expected(*given_)
    assert outputs.dtype == dtype and outputs.shape == right.shape
    inputs, values, scales = given_
    weight = values * scales.repeat_interleave(64, dim=1)
    assert is_right(outputs, right, inputs, weight, (inputs, weight, 32767))


def make_int4(num_tokens: int, out_features: int, num_chunks: int, seed: int = 0):
    """Returns inputs, weights of 4 bits as the kernel reads them, what they stand for, and q * scale alone."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_tokens, 64 * num_chunks, generator=generator)
    numbers = torch.randint(16, (out_features, num_chunks, 2, 32), generator=generator, dtype=torch.uint8)
    scales = torch.randn(out_features, 2 * num_chunks, 2, generator=generator).bfloat16()
    steps, least = (scales[..., i].float().repeat_interleave(32, dim=1) for i in (0, 1))
    values = (numbers[:, :, 0] + 16 * numbers[:, :, 1]).flatten(1)
    columns = torch.rand(64 * num_chunks, generator=generator).bfloat16()
    products = numbers.flatten(1).float() * steps
    return inputs, (values, scales, columns), (products + least) * columns.float(), products


@settings(deadline=None)
@given(
    num_tokens=st.integers(1, 9), out_features=st.integers(1, 40), num_chunks=st.integers(1, 4),
    dtype=st.sampled_from(cpu.DTYPES), num_threads=st.integers(1, 3), seed=st.integers(0, 2**31), data=st.data(),
)  # fmt: skip
def test_products_of_4_bits(num_tokens, out_features, num_chunks, dtype, num_threads, seed, data):
    inputs, packed, weight, products = make_int4(num_tokens, out_features, num_chunks, seed)
    rows = data.draw(st.lists(st.integers(0, out_features - 1), unique=True), label="rows")
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        outputs = cpu.int4_product(inputs.to(dtype), *packed)
        some = cpu.int4_product(inputs.to(dtype), *packed, torch.tensor(rows, dtype=torch.long))
    finally:
        torch.set_num_threads(before)
    assert outputs.dtype == dtype and outputs.shape == (num_tokens, out_features)
    inputs, right = inputs.to(dtype), inputs.to(dtype).double() @ weight.double().T
    rounded = inputs * packed[-1].float(), products, 127
    assert is_right(outputs, right, inputs, weight, rounded)
    others = [row for row in range(out_features) if row not in rows]
    assert not some[:, others].any()
    rounded = rounded[0], products[rows], 127
    assert is_right(some[:, rows], right[:, rows], inputs, weight[rows], rounded)


@settings(deadline=None)
@given(
    num_tokens=st.integers(1, 70), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    dtype=st.sampled_from(cpu.DTYPES), seed=st.integers(0, 2**31), is_int4=st.booleans(),
)  # fmt: skip
def test_several_products_at_once(num_tokens, sizes, dtype, seed, is_int4):
    """Each is what it is alone."""
    inputs = make(num_tokens, 1, 2, seed)[0].to(dtype)
    name, product = ("int4", cpu.int4_product) if is_int4 else ("grouped", cpu.grouped_product)
    weights = [make_int4(1, size, 2, seed + 1)[1] if is_int4 else make(1, size, 2, seed + 1)[1:] for size in sizes]
    for outputs, weight in zip(cpu.Products(name, weights)(inputs), weights, strict=True):
        assert torch.equal(outputs, product(inputs, *weight))


@pytest.mark.parametrize("width", [8, 16, None])  # LLVM takes vectors apart that a processor does not have
@pytest.mark.parametrize("weight_dtype", [*cpu.DTYPES, torch.int8, torch.uint8])
def test_vectors_of_any_processor(width, weight_dtype, monkeypatch):
    from hf_sirius.kernels import dots, vectors

    if width is not None:
        monkeypatch.setattr(vectors, "WIDTH", width)
        monkeypatch.setattr(vectors, "_HAS_FOURS", False)
    inputs, values, scales = make(6, 8, 3)
    with (
        mock.patch.object(dots, "_dots", dots._dots.__wrapped__),
        mock.patch.object(dots, "_rounding", dots._rounding.__wrapped__),
        mock.patch.object(cpu, "_kernels", {}),
    ):
        rounded = None
        if weight_dtype == torch.int8:
            outputs, weight = cpu.grouped_product(inputs, values, scales), values * scales.repeat_interleave(64, dim=1)
            rounded = inputs, weight, 32767
        elif weight_dtype == torch.uint8:
            inputs, packed, weight, products = make_int4(6, 8, 3)
            outputs, rounded = cpu.int4_product(inputs, *packed), (inputs * packed[-1].float(), products, 127)
        else:
            weight = values.to(weight_dtype)[:, :150].contiguous()
            inputs = inputs[:, :150].contiguous()
            outputs = cpu.product(inputs, weight)
    assert is_right(outputs, inputs.double() @ weight.double().T, inputs, weight, rounded)


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("packed", ["int8", "int4"])
def test_rounded_inputs(packed, dtype):
    """What is rounded by a group's own scale does not lose small inputs beside large ones, nor what is not finite."""
    if packed == "int8":
        inputs, values, scales = make(7, 5, 2)
        product, tensors, num_steps = cpu.grouped_product, (values, scales), 32767
        weight = products = values * scales.repeat_interleave(64, dim=1)
    else:
        inputs, tensors, weight, products = make_int4(7, 5, 2)
        product, scales, num_steps = cpu.int4_product, tensors[1], 127
    columns = 1 if packed == "int8" else tensors[-1].float()
    inputs = inputs.to(dtype)
    inputs[0, 64:] *= 1e4  # other channels
    inputs[1] *= 1e-20
    inputs[2] *= 1e20
    inputs[3] = 0
    inputs[4, 3], inputs[5, 70], inputs[6, 9] = float("nan"), float("inf"), -float("inf")
    outputs, finite = product(inputs, *tensors), inputs[:4]
    rounded = finite * columns, products, num_steps
    assert is_right(outputs[:4], finite.double() @ weight.double().T, finite, weight, rounded)
    assert not outputs[4:].isfinite().any()
    assert outputs[3].eq(0).all()
    # Of rows in which the large inputs count for nothing, the others are seen as if they were alone.
    scales[:, scales.shape[1] // 2 :] = 0
    small, first = product(inputs[:1], *tensors), finite[:1, :64]
    rounded = rounded[0][:1, :64], products[:, :64], num_steps
    assert is_right(small, first.double() @ weight[:, :64].double().T, first, weight[:, :64], rounded)


@pytest.mark.parametrize("product", [cpu.grouped_product, cpu.int4_product])
def test_inputs_of_any_shape(product):
    inputs, *packed = make(130, 9, 2)
    packed = make_int4(130, 9, 2)[1] if product is cpu.int4_product else packed
    outputs = product(inputs, *packed)
    for shape in ((2, 65), (5, 13, 2), (130,)):
        assert torch.equal(product(inputs.view(*shape, 128), *packed), outputs.view(*shape, 9))
    assert torch.allclose(product(inputs[3], *packed), outputs[3], rtol=1e-4)
    assert product(inputs[:0], *packed).shape == (0, 9)
    for wrong in (inputs[:, :64].contiguous(), inputs[:, :100].contiguous()):
        with pytest.raises(RuntimeError, match="do not go with weights of the shapes"):
            product(wrong, *packed)


def test_memory_that_a_kernel_cannot_read_is_refused():
    inputs, values, scales = make(3, 8, 2)
    for wrong in (inputs.T.contiguous().T, inputs.to("meta")):
        with pytest.raises(RuntimeError, match="wants tensors there"):
            cpu.grouped_product(wrong, values, scales)


@pytest.mark.parametrize(
    "error",
    [ImportError("no"), AttributeError("no"), SystemError("no"), ModuleNotFoundError("no", name="numpy")],
    ids=lambda error: type(error).__name__,
)
def test_a_numba_that_does_not_work_is_told_once(error, monkeypatch, caplog):
    monkeypatch.setattr(cpu, "_kernels", {})
    monkeypatch.setattr(cpu, "_compiled", mock.Mock(side_effect=error))
    cpu.is_available.cache_clear()
    try:
        assert not cpu.is_available() and not cpu.is_available()
    finally:
        cpu.is_available.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "numba does not work here (no): drafts on a CPU are slower without it"
    ]


@pytest.mark.parametrize("missing", ["numba", "llvmlite"])
def test_a_missing_numba_is_told_once(missing, monkeypatch, caplog):
    if missing == "numba":
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        monkeypatch.setattr(cpu, "_compiled", mock.Mock(side_effect=ModuleNotFoundError("no", name="llvmlite")))
    monkeypatch.setattr(cpu, "_kernels", {})
    cpu.is_available.cache_clear()
    try:
        assert not cpu.is_available() and not cpu.is_available()
    finally:
        cpu.is_available.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "numba is missing, without which drafts on a CPU are slower: pip install hf_sirius[cpu]"
    ]


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_what_is_not_finite_stays_so(dtype):
    inputs, values, scales = make(1, 8, 1)
    values[:], scales[:] = 1, 1
    for number in (float("nan"), float("inf"), -float("inf")):
        inputs[0, 3] = number
        outputs = cpu.product(inputs.to(dtype), values.to(dtype))
        assert torch.equal(outputs, torch.full_like(outputs, number)) or (outputs.isnan().all() and number != number)
        assert not cpu.grouped_product(inputs.to(dtype), values, scales).isfinite().any()


def test_defaults_of_the_user_change_nothing():
    inputs, values, scales = make(5, 8, 2)
    right = cpu.grouped_product(inputs.bfloat16(), values, scales)
    cpu._is_faster.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(cpu.grouped_product(inputs.bfloat16(), values, scales), right)
            assert cpu.is_faster(torch.bfloat16, 5) in (True, False)
    finally:
        torch.set_default_dtype(torch.float32)
        cpu._is_faster.cache_clear()


def test_numbers_are_rounded_to_bfloat16_as_torch_rounds_them():
    # One input of 1: the outputs are the weights. Every upper half, with what lies below, at and above the middle.
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (torch.arange(2**16)[:, None] << 16 | lower).flatten()
    weight = bits.to(torch.int32).view(torch.float32)
    weight = weight[weight.isfinite()][:, None]
    outputs = cpu.product(torch.ones(1, 1, dtype=torch.bfloat16), weight)
    assert torch.equal(outputs[0], weight[:, 0].bfloat16())


def test_which_product_is_faster_is_measured_once_for_a_range(monkeypatch):
    seconds, clock = {"ours": 1.0, "theirs": 1.0}, [0.0]

    def product_of(whose):
        def product(inputs, weight):
            clock[0] += seconds[whose] * len(inputs)

        return product

    monkeypatch.setattr(cpu, "product", product_of("ours"))
    monkeypatch.setattr(cpu.nn.functional, "linear", product_of("theirs"))
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: clock[0])
    try:
        for ours, is_faster in ((0.5, True), (0.99, False), (2.0, False)):
            cpu._is_faster.cache_clear()
            seconds["ours"] = ours
            assert cpu.is_faster(torch.float32, 5) is is_faster
            seconds["ours"] = 2.5 - ours  # is not looked at
            assert cpu.is_faster(torch.float32, 7) is cpu.is_faster(torch.float32, 8) is is_faster
        assert not cpu.is_faster(torch.float16, 5) and not cpu.is_faster(torch.float32, 0)
        cpu._is_faster.cache_clear()
        seconds["ours"] = 0.5
        assert cpu.is_faster(torch.float32, 64)
        seconds["ours"] = 2.0  # of longer texts
        assert not any(cpu.is_faster(torch.float32, num_tokens) for num_tokens in (65, 128, 500))
        assert cpu._is_faster.cache_info().currsize == 2
    finally:
        cpu._is_faster.cache_clear()


def test_several_threads_at_once():
    given_ = make(2, 300, 6)
    right, wrong = expected(*given_), []

    def run():
        for _ in range(50):
            if (cpu.grouped_product(*given_) - right).norm() > 1e-4 * right.norm():
                wrong.append(True)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("told", [{"NUMBA_CPU_NAME": "generic"}, {"NUMBA_ENABLE_AVX": "0"}], ids=str)
def test_numba_may_compile_for_another_processor(told):
    """LLVM ends the process where code has an instruction that the processor it is for does not have."""
    code = (
        "import torch; from hf_sirius.kernels import cpu; "
        "values = torch.full((3, 32), 17, dtype=torch.uint8); scales = torch.ones(3, 2, 2).bfloat16(); "
        "print(cpu.int4_product(torch.ones(1, 64), values, scales, torch.ones(64).bfloat16()).tolist())"
    )
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, **told}, capture_output=True, text=True)
    assert ran.stdout.strip() == "[[128.0, 128.0, 128.0]]", ran.stderr
