"""Drafts that are cast or quantized, and full models that bitsandbytes has quantized."""

import contextlib
import importlib.util
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model, make_prompt
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from hf_sirius import make_sparse, reasoner_path, reasoner_problems
from hf_sirius.cli import main as cli
from hf_sirius.kernels import cpu
from hf_sirius.settings.fields import DRAFT_DTYPES
from hf_sirius.study.problems import problem_prompt
from hf_sirius.weights import gather
from hf_sirius.weights.bnb import is_4bit, is_8bit, quantized_to_4bit, quantized_to_8bit
from hf_sirius.weights.formats import (
    changes,
    check_draft_dtype,
    dense_weight,
    draft_linear,
    head_dtype,
    num_bytes,
    num_elements,
)
from hf_sirius.weights.gather import Selection
from hf_sirius.weights.linear import DraftLinear, native_products


# Of outputs, relative in norm: of weights with an even share of all sizes, quantized as a whole.
TOLERANCE = {None: 1e-6, "bfloat16": 0.01, "float16": 0.002, "int8": 0.03, "int4": 0.2, "nf4": 0.2}


@pytest.fixture(autouse=True)
def no_dtype_was_tried():
    check_draft_dtype.cache_clear()


def make_projection(kind: str, in_features: int, out_features: int, bias: bool = True, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    projection = Conv1D(out_features, in_features) if kind == "Conv1D" else nn.Linear(in_features, out_features, bias)
    for parameter in projection.parameters():
        nn.init.normal_(parameter)
    return projection.eval()


def held_bytes(draft: DraftLinear) -> int:
    """Returns the bytes of all tensors that a draft's projection keeps alive, as they were when it was made."""
    linear = draft.linear
    num_bytes = sum(parameter.nbytes for parameter in linear.parameters())
    if is_8bit(linear):
        num_bytes += (linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB).nbytes
    if is_4bit(linear):
        # In the first forward bitsandbytes makes them bfloat16 where the processor has AVX-512 for it.
        num_bytes += linear.weight.quant_state.absmax.numel() * torch.float32.itemsize
    return num_bytes


# Projections


@given(
    kind=st.sampled_from(["Linear", "Conv1D"]),
    draft_dtype=st.sampled_from([None, *DRAFT_DTYPES]),
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    chosen=st.sampled_from(["all", "rows", "columns"]),
    bias=st.booleans(),
    chunk=st.sampled_from([gather._CHUNK, 300]),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_a_drafts_projection_computes_what_the_chosen_part_does(kind, draft_dtype, sizes, chosen, bias, chunk, data):
    in_features, out_features = sizes
    bias |= kind == "Conv1D"
    projection = make_projection(kind, in_features, out_features, bias)
    weight = projection.weight.T if kind == "Conv1D" else projection.weight
    expected_bias = projection.bias
    rows = columns = None
    if chosen != "all":
        size = out_features if chosen == "rows" else in_features
        num_chosen = data.draw(st.integers(1, size))
        indices = torch.randperm(size)[:num_chosen].sort().values
        if chosen == "rows":
            rows, weight, expected_bias = (
                indices,
                weight[indices],
                None if projection.bias is None else expected_bias[indices],
            )
        else:
            columns, weight = indices, weight[:, indices]
    with torch.no_grad(), mock.patch.object(gather, "_CHUNK", chunk):
        hidden_states = torch.randn(2, 3, weight.shape[1])
        expected = nn.functional.linear(hidden_states, weight, expected_bias)
        draft = draft_linear(projection, draft_dtype, rows, columns)
        outputs = draft(hidden_states)
    assert outputs.dtype == hidden_states.dtype and outputs.shape == expected.shape
    scale = hidden_states.norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
    assert ((outputs - expected).abs() <= TOLERANCE[draft_dtype] * (scale + expected.abs() + 1)).all()
    promised = num_bytes(projection, draft_dtype, *(None if i is None else len(i) for i in (rows, columns)))
    assert held_bytes(draft_linear(projection, draft_dtype, rows, columns)) == promised


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("draft_dtype", [None, *DRAFT_DTYPES])
def test_a_drafts_projection_keeps_the_models_dtype(dtype, draft_dtype):
    projection = make_projection("Linear", 70, 50).to(dtype)
    hidden_states = torch.randn(1, 4, 70, dtype=dtype)
    with torch.no_grad():
        outputs, expected = draft_linear(projection, draft_dtype)(hidden_states), projection(hidden_states)
    assert outputs.dtype == dtype
    assert (outputs - expected).norm() < 0.15 * expected.norm()


def quantized(kind: str, in_features: int = 128, out_features: int = 96) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    source = make_projection("Linear", in_features, out_features)
    if kind == "int8":
        layer = Linear8bitLt(in_features, out_features, has_fp16_weights=False)
    else:
        quant_type, nested = kind.split()
        layer = Linear4bit(in_features, out_features, compress_statistics=nested == "nested", quant_type=quant_type)
    layer.load_state_dict(source.state_dict())
    return layer.to("cpu").eval()


@pytest.mark.parametrize("kind", ["int8", "nf4 plain", "nf4 nested", "fp4 plain"])
@pytest.mark.parametrize("warm", [False, True], ids=["new", "used"])
def test_neurons_of_a_quantized_layer(kind, warm):
    layer, hidden_states = quantized(kind), torch.randn(1, 3, 128)
    rows = torch.tensor([1, 5, 6, 40, 95])
    with torch.no_grad():
        if warm:  # the first forward may pack the weight anew
            layer(hidden_states)
        kept = [p.clone() for p in layer.parameters()]
        outputs = draft_linear(layer, None, rows=rows)(hidden_states)
        columns = draft_linear(layer, None, columns=torch.arange(64))
        assert all(torch.equal(a, b) for a, b in zip(kept, layer.parameters(), strict=True)), "the layer as it was"
        expected = layer(hidden_states)[..., rows]
        first_half = hidden_states.clone()
        first_half[..., 64:] = 0
        halves = columns(hidden_states[..., :64]), layer(first_half)
    # 4-bit kernels may compute in bfloat16; int8 rows are the very same.
    torch.testing.assert_close(outputs, expected, rtol=0.05, atol=0.0 if kind == "int8" else 0.5)
    assert (halves[0] - halves[1]).norm() < 0.05 * halves[1].norm()
    promised = num_bytes(layer, None, num_rows=len(rows))
    assert promised * 0.95 <= held_bytes(draft_linear(layer, None, rows=rows)) <= promised
    weight = dense_weight(layer)
    assert weight.shape == (96, 128) and num_elements(layer.weight) == 96 * 128
    source = make_projection("Linear", 128, 96).weight
    assert (weight - source).norm() < 0.3 * source.norm()


@pytest.mark.parametrize("draft_dtype", DRAFT_DTYPES)
@pytest.mark.parametrize("kind", ["int8", "nf4 plain"])
def test_a_quantized_layer_drafts_in_another_dtype(kind, draft_dtype):
    layer, hidden_states = quantized(kind), torch.randn(1, 3, 128)
    with torch.no_grad():
        outputs = draft_linear(layer, draft_dtype, rows=torch.arange(32))(hidden_states)
        expected = nn.functional.linear(hidden_states, dense_weight(layer).float(), layer.bias)[..., :32]
    assert (outputs - expected).norm() < 0.15 * expected.norm()


# Models


@pytest.mark.parametrize("draft_scope", ["mlp", "all"])
@pytest.mark.parametrize("draft_dtype", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2"])
def test_a_quantized_draft_is_corrected(family, draft_dtype, draft_scope):
    model, prompt = build_model(family), make_prompt()
    dense = model.generate(prompt, max_new_tokens=20)
    fields = {"method": "griffin", "density": 0.8, "threshold": 1.0, "kernel_size": 16}
    with make_sparse(model, **fields, draft_dtype=draft_dtype, draft_scope=draft_scope) as sparse:
        assert torch.equal(model.generate(prompt, assistant_model=sparse, max_new_tokens=20), dense)
        assert sparse.stats.num_accepted > 0 and sparse.stats.num_rolled_back > 0
    assert torch.equal(model.generate(prompt, max_new_tokens=20), dense)


def test_packed_neurons_come_in_whole_blocks():
    model = build_model(intermediate_size=192)
    with make_sparse(model, method="griffin", density=0.5, draft_dtype="nf4") as sparse, sparse.new_call() as call:
        with call.draft.observing(None):
            model(make_prompt())
        call.draft.select()
        assert {len(neuron_indices) for neuron_indices in call.draft.method.neuron_indices} == {128}


@pytest.fixture(scope="module", params=["8 bits", "4 bits", "4 bits, nested"])
def quantized_reasoner(request):
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if request.param == "8 bits"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant="nested" in request.param
        )
    )
    model = AutoModelForCausalLM.from_pretrained(
        reasoner_path(), quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    tokenizer = AutoTokenizer.from_pretrained(reasoner_path())
    prompts = [tokenizer(problem_prompt(p["question"]), return_tensors="pt") for p in reasoner_problems()[:2]]
    return model, prompts, [model.generate(**prompt, max_new_tokens=100, do_sample=False) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"method": "cats"},
        {"method": "cats", "selection": "topk"},
        {"method": "griffin"},
        {"method": "griffin", "draft_dtype": "bfloat16"},
        {"method": "griffin", "draft_dtype": "nf4", "draft_scope": "all"},
        {"method": "griffin", "tree_width": 3},
        {"method": "cats", "tree_width": 2},
    ],
    ids=str,
)
def test_a_quantized_model_keeps_its_output(quantized_reasoner, fields):
    model, prompts, expected = quantized_reasoner
    weights = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    with make_sparse(model, threshold=1.0, kernel_size=16, **fields) as sparse:
        for prompt, dense in zip(prompts, expected, strict=True):
            output = model.generate(**prompt, assistant_model=sparse, max_new_tokens=100, do_sample=False)
            assert torch.equal(output, dense)
        assert sparse.stats.total.aal > 8 and 0.4 < sparse.stats.draft_density < 0.9
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == weights


@pytest.mark.slow
def test_a_quantized_model_can_be_calibrated_for(quantized_reasoner):
    from hf_sirius import calibrate

    model, prompts, expected = quantized_reasoner
    calibration = calibrate(model, None, [prompt["input_ids"][0] for prompt in prompts])
    with make_sparse(model, threshold=1.0, kernel_size=16, calibration=calibration) as sparse:
        output = model.generate(**prompts[0], assistant_model=sparse, max_new_tokens=100, do_sample=False)
    assert torch.equal(output, expected[0])


def test_make_sparse_draws_no_random_number():
    draws = []
    for draft_dtype in (None, "bfloat16", "int8", "nf4"):
        model = build_model()
        torch.manual_seed(0)
        make_sparse(model, method="griffin", draft_dtype=draft_dtype)
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 1


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("tree_width", [1, 2])
@pytest.mark.parametrize(
    "dtype, draft_dtype", [(torch.bfloat16, None), (torch.float32, "bfloat16"), (torch.float32, None)]
)
def test_bfloat16_drafts_run_past_onednn(dtype, draft_dtype, tree_width, has_kernels, monkeypatch):
    """But for trees, whose steps are of several tokens, and where kernels read the weights."""
    if has_kernels:
        pytest.importorskip("numba", reason="numba is not installed")
    else:
        monkeypatch.setattr(cpu, "is_available", lambda: False)
    model, seen = build_model(dtype=dtype), []
    with make_sparse(model, method="griffin", draft_dtype=draft_dtype, tree_width=tree_width) as sparse:
        note = sparse.register_forward_pre_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=8)
        note.remove()
    is_bfloat16 = torch.bfloat16 in (dtype, getattr(torch, draft_dtype or "float32"))
    is_past = is_bfloat16 and tree_width == 1 and not has_kernels
    assert seen and set(seen) == {not is_past and torch.backends.mkldnn.enabled}


def test_the_precision_of_float32_products_stays_the_users():
    def precision() -> str:
        return torch.backends.mkldnn.fp32_precision

    with torch.backends.mkldnn.flags(enabled=True, allow_tf32=None, fp32_precision="bf16"):
        before = precision()
        with native_products():
            assert not torch.backends.mkldnn.enabled and precision() == before
        assert torch.backends.mkldnn.enabled and precision() == before


def test_onednn_is_back_when_the_last_draft_has_ended():
    enabled = torch.backends.mkldnn.enabled
    first, second = native_products(), native_products()
    with contextlib.ExitStack() as later:
        with first:
            later.enter_context(second)
            assert not torch.backends.mkldnn.enabled
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled == enabled
    with pytest.raises(KeyboardInterrupt), native_products():
        raise KeyboardInterrupt
    assert torch.backends.mkldnn.enabled == enabled


@pytest.mark.parametrize("kind", ["nf4 plain", "fp4 plain", "nf4 nested"])
def test_a_4bit_projection_is_no_other_in_its_own_format(kind):
    """So that a draft does not quantize, and hold, the same weight twice."""
    projection = quantized(kind)
    own = projection.weight.quant_state.quant_type
    assert changes(projection, "nf4") == (own != "nf4")
    assert changes(projection, "bfloat16") and changes(projection, "int8") and not changes(projection, None)


# What cannot be


@pytest.fixture
def no_bitsandbytes(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find_spec(name, *a)
    )


def test_a_head_is_in_8_bits_where_the_device_runs_them(no_bitsandbytes):
    assert [head_dtype(dtype, torch.device("cpu")) for dtype in ("int4", "int8", None)] == ["int8", "int8", None]
    assert [head_dtype(dtype, torch.device("cuda")) for dtype in ("int4", "nf4", None)] == ["int4", "nf4", None]


def test_bitsandbytes_missing(no_bitsandbytes, capsys):
    draft_dtype = "nf4"
    model = build_model()
    with pytest.raises(ImportError, match=rf"'{draft_dtype}' needs bitsandbytes: pip install hf_sirius\[bnb\]"):
        make_sparse(model, method="griffin", draft_dtype=draft_dtype)
    assert "generate" not in model.__dict__
    options = ["--model", "reasoner", "--prompt", "x", "--method", "griffin", "--draft_dtype", draft_dtype]
    assert cli.main(["generate", *options]) == 2
    assert "hf_sirius[bnb]" in capsys.readouterr().err


def test_a_device_that_cannot_run_the_dtype(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr("bitsandbytes.nn.Linear4bit.forward", refuse)
    with pytest.raises(ValueError, match=r"'nf4' does not run on cpu \(NotImplementedError: no such kernel\)"):
        make_sparse(build_model(), method="griffin", draft_dtype="nf4")


@pytest.mark.parametrize("draft_dtype", ["int8", "nf4"])
def test_a_conv1d_is_quantized_from_memory_that_lies_in_rows(draft_dtype, monkeypatch):
    """Its weight is stored the other way about, and the CUDA kernels of bitsandbytes do not ask for strides."""
    import bitsandbytes.functional

    seen = []
    for name in ("int8_vectorwise_quant", "quantize_4bit"):
        quantize = getattr(bitsandbytes.functional, name)

        def noting(weight, *args, quantize=quantize, **kwargs):
            seen.append(weight.is_contiguous())
            return quantize(weight, *args, **kwargs)

        monkeypatch.setattr(bitsandbytes.functional, name, noting)
    projection = Conv1D(64, 128).half()
    source = Selection(dense_weight(projection))
    if draft_dtype == "int8":
        linear = quantized_to_8bit(source, None)
    else:
        linear = quantized_to_4bit(source, None, "nf4", torch.float32)
    assert seen and all(seen)
    assert torch.allclose(dense_weight(linear.linear)[:64, :128].float(), projection.weight.T.float(), atol=0.02)


@pytest.mark.parametrize("where", ["hf_sirius.weights.formats.draft_linear", "hf_sirius.draft.tree_reading._read"])
def test_a_full_device_is_not_taken_for_one_that_cannot(where, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(where, full)
    with pytest.raises(torch.OutOfMemoryError):
        make_sparse(build_model(), method="griffin", draft_dtype="bfloat16", tree_width=2)
