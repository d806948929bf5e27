"""Full models that other libraries than bitsandbytes have quantized: GGUF files, torchao, and a stand-in for all those
whose layers are modules of their own (GPTQ, AWQ, HQQ, quanto, ...).
"""

import math

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import save_file
from tiny import METHODS, build_model, build_tokenizer, make_prompt, slow, sparse_logits
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.utils.quantization_config import QuantizationMethod

from hf_sirius import calibrate, make_sparse
from hf_sirius.model import projections
from hf_sirius.model.sites import find_mlps, find_projections
from hf_sirius.weights import formats
from hf_sirius.weights.formats import changes, dense_weight, draft_linear, num_bytes


GREEDY = {"max_new_tokens": 14, "do_sample": False}
LOSSLESS = {"threshold": 1.0, "density": 0.5, "kernel_size": 4}
DTYPES = [None, "bfloat16", "int8", "int4"]
GROUP = 16


class PackedLayer(nn.Module):
    """A layer as libraries have them: 4 bits packed into integers, scales, and a bias, which are buffers."""

    def __init__(self, dense: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        groups = dense.weight.detach().T.reshape(-1, GROUP, self.out_features)
        scales = groups.abs().amax(dim=1, keepdim=True) / 7
        values = ((groups / scales).round() + 8).to(torch.int32).view(-1, 8, self.out_features)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)[:, None]
        self.register_buffer("qweight", (values << shifts).sum(dim=1).to(torch.int32))
        self.register_buffer("scales", scales.squeeze(1))
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach().clone())

    def unpacked(self) -> torch.Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)[:, None]
        values = ((self.qweight[:, None] >> shifts) & 15) - 8
        return (values.view(-1, GROUP, self.out_features) * self.scales[:, None]).view(self.in_features, -1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = inputs @ self.unpacked().to(inputs.dtype)
        return outputs if self.bias is None else outputs + self.bias


def pack(model: nn.Module, layer_class: type[nn.Module] = PackedLayer) -> nn.Module:
    for site in find_projections(model):
        setattr(site.owner, site.attribute, layer_class(site.module))
    model.is_quantized, model.quantization_method = True, QuantizationMethod.GPTQ
    return model


def packed_model(**fields) -> nn.Module:
    return pack(build_model(**{"attention_bias": True, "mlp_bias": True, **fields}))


def unpacked_model() -> nn.Module:
    """Returns a `packed_model` whose weights lie open."""
    model = build_model(attention_bias=True, mlp_bias=True)
    for site in find_projections(model):
        site.module.weight.data = PackedLayer(site.module).unpacked().T.contiguous()
    return model


def check_output(model, **fields) -> None:
    expected = model.generate(make_prompt(), **GREEDY)
    with make_sparse(model, **{**LOSSLESS, **fields}) as twin:
        assert torch.equal(model.generate(make_prompt(), assistant_model=twin, **GREEDY), expected)
        assert twin.stats.num_drafted


# Layers of any library


@pytest.mark.parametrize("draft_dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_output_is_the_models_own(method, draft_dtype):
    check_output(packed_model(), draft_dtype=draft_dtype, **METHODS[method])


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_without_any_setting(family):
    model = pack(build_model(family))
    expected = model.generate(make_prompt(), **GREEDY)
    with make_sparse(model, threshold=1.0, kernel_size=5) as twin:
        assert torch.equal(model.generate(make_prompt(), assistant_model=twin, **GREEDY), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("product", [1, 300, 2**24])
def test_the_weight_is_read_exactly(product, dtype, monkeypatch):
    """Also beside a bias that would swallow it."""
    monkeypatch.setattr(formats, "_PRODUCT", product)
    torch.manual_seed(0)
    dense = nn.Linear(64, 48).to(dtype)
    nn.init.constant_(dense.bias, 1e6)
    layer = PackedLayer(dense)
    weight = dense_weight(layer)
    assert weight.dtype == dtype and torch.equal(weight, layer.unpacked().T)
    assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize("draft_dtype", DTYPES)
def test_its_format_differs_from_any_dtype_and_its_bytes_are_promised(draft_dtype):
    layer = PackedLayer(nn.Linear(64, 48))
    assert changes(layer, draft_dtype) == (draft_dtype is not None)
    for rows, columns in ((None, None), (torch.arange(0, 40, 2), None), (None, torch.arange(1, 64, 3))):
        linear = draft_linear(layer, draft_dtype, rows, columns).linear
        promised = num_bytes(
            layer, draft_dtype, *(None if chosen is None else len(chosen) for chosen in (rows, columns))
        )
        assert sum(parameter.nbytes for parameter in linear.parameters()) == promised


@pytest.mark.parametrize("method", METHODS)
def test_a_draft_is_that_of_the_weights_that_it_stands_for(method):
    prompt, tokens = make_prompt(), make_prompt(6, seed=1)
    logits, densities = [], []
    for model in (packed_model(), unpacked_model()):
        with make_sparse(model, **LOSSLESS, **METHODS[method]) as twin:
            logits.append(sparse_logits(twin, prompt, tokens))
            model.generate(prompt, assistant_model=twin, **GREEDY)
            densities.append(twin.stats.draft_density)
    torch.testing.assert_close(*logits)
    assert densities[0] == pytest.approx(densities[1]) and densities[0] < 1


@pytest.mark.parametrize("fields", [METHODS["cats-topk"], METHODS["teal"]])
def test_what_reads_no_weights_dequantizes_nothing(fields, monkeypatch):
    def fail(*_):
        raise AssertionError("dequantized")

    model = packed_model()
    monkeypatch.setattr(projections, "product_without_bias", fail)
    check_output(model, **fields)


@pytest.mark.parametrize("fields", [METHODS["griffin"], {"draft_dtype": "int8"}, METHODS["teal-column"]])
def test_the_model_stays_as_it_was(fields):
    model = packed_model()
    modules = dict(model.named_modules())
    tensors = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    check_output(model, **fields)
    assert dict(model.named_modules()) == modules
    assert {name: set(vars(module)) for name, module in modules.items()} == attributes
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is tensors[name][0] and torch.equal(tensor, tensors[name][1])


def cast_of(layer, twin) -> nn.Module:
    with twin.new_call() as call, call.draft.drafting():
        return call.draft.held[layer]


def scale(layer):
    layer.scales *= 2


def write_behind_autograds_back(layer):
    layer.qweight.data[0] ^= 0x33333333


def replace(layer):
    layer.scales = layer.scales * 0.5


@pytest.mark.parametrize("change", [scale, write_behind_autograds_back, replace])
def test_a_change_of_a_buffer_reaches_the_casts(change):
    model = packed_model()
    layer = find_mlps(model)[0].gate
    with make_sparse(model, density=1.0, draft_dtype="bfloat16") as twin:
        before = cast_of(layer, twin)
        assert cast_of(layer, twin) is before
        change(layer)
        assert cast_of(layer, twin) is not before
        assert torch.equal(cast_of(layer, twin).linear.weight, layer.unpacked().T.bfloat16())


def test_it_can_be_calibrated_for():
    model = packed_model()
    calibration = calibrate(model, build_tokenizer(), [" ".join(f"w{i}" for i in range(1, 40))])
    check_output(model, method="cats", calibration=calibration)
    check_output(unpacked_model(), method="cats", calibration=calibration)


class Rectified(PackedLayer):
    """No product with a weight."""

    def forward(self, inputs):
        return super().forward(inputs).relu()


class Broken(PackedLayer):
    """A layer that takes a single token."""

    def forward(self, inputs):
        if inputs.ndim == 2:
            raise RuntimeError("no kernel")
        return super().forward(inputs)


@pytest.mark.parametrize("layer_class, reason", [(Rectified, "no product with a weight"), (Broken, "no kernel")])
def test_a_layer_that_cannot_be_read_is_named(layer_class, reason):
    model = pack(build_model(), layer_class)
    told = rf"{layer_class.__name__}: draft by method='cats', or method='teal' with weighting='magnitude'.*{reason}"
    with pytest.raises(ValueError, match=told):
        make_sparse(model, draft_dtype="int8", density=1.0)
    with pytest.raises(ValueError, match=told):
        check_output(model, method="teal", weighting="column")
    check_output(model, method="cats")
    check_output(model, method="teal")
    with make_sparse(model) as twin:
        assert twin.sirius_config.method == "cats" and twin.sirius_config.draft_dtype is None


def test_a_full_device_is_not_taken_for_a_layer_that_cannot_be_read(monkeypatch):
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    layer = PackedLayer(nn.Linear(64, 48))
    monkeypatch.setattr(PackedLayer, "forward", fill)
    with pytest.raises(torch.OutOfMemoryError):
        dense_weight(layer)


def test_a_quantized_model_that_is_offloaded_as_well_is_refused():
    model = cpu_offload(packed_model())
    with pytest.raises(ValueError, match=r"quantized by gptq and offloaded as well.*unquantized model.*draft_dtype"):
        make_sparse(model)


@pytest.mark.parametrize("fields", [METHODS["cats-topk"], METHODS["griffin"], {"draft_dtype": "int8"}])
def test_a_library_that_unpacks_in_the_first_forward(fields):
    """As compressed-tensors does, by a hook on the model."""
    model = packed_model()
    dense = unpacked_model()

    def unpack(model, *_):
        handle.remove()
        for site, other in zip(find_projections(model), find_projections(dense), strict=True):
            setattr(site.owner, site.attribute, other.module)

    handle = model.register_forward_pre_hook(unpack)
    with make_sparse(model, **LOSSLESS, **fields) as twin:
        output = model.generate(make_prompt(), assistant_model=twin, **GREEDY)
    assert torch.equal(output, dense.generate(make_prompt(), **GREEDY))


# GGUF


def gguf_model(folder, quantized_as: str, **kwargs):
    """Returns a tiny Llama, loaded from a file as llama.cpp has it."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install hf_sirius[real]")
    model = build_model(dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values, raw_dtype = tensor.contiguous().numpy(), None
        if "_proj" in name:
            raw_dtype = gguf.GGMLQuantizationType[quantized_as]
            values = gguf.quants.quantize(values, raw_dtype)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", **kwargs)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(loaded.generation_config, name, None)
    return loaded


@pytest.mark.parametrize("quantized_as", ["Q8_0", *slow("F32", "Q4_0")])
def test_a_gguf_file(quantized_as, tmp_path):
    model = gguf_model(tmp_path, quantized_as)
    for draft_dtype in DTYPES:
        for fields in METHODS.values():
            check_output(model, draft_dtype=draft_dtype, **fields)


def test_a_gguf_file_that_was_dequantized_can_be_offloaded(tmp_path):
    check_output(cpu_offload(gguf_model(tmp_path, "Q8_0")), method="griffin")


def fp8_model(folder):
    """Returns a tiny Llama, dequantized from a file of numbers of 8 bits with a scale for each 128 x 128 of them."""
    model = build_model(dtype=torch.float32, hidden_size=128, intermediate_size=256)
    model.config.quantization_config = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    model.config.save_pretrained(folder)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "_proj" in name:
            num_rows, num_columns = (-(-size // 128) for size in tensor.shape)
            padded = torch.zeros(num_rows * 128, num_columns * 128)
            padded[: tensor.shape[0], : tensor.shape[1]] = tensor
            blocks = padded.view(num_rows, 128, num_columns, 128)
            scales = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
            values = (blocks / scales).to(torch.float8_e4m3fn).view(padded.shape)
            tensors[name] = values[: tensor.shape[0], : tensor.shape[1]].contiguous()
            tensors[f"{name}_scale_inv"] = scales[:, 0, :, 0].contiguous()
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_numbers_of_8_bits_that_were_dequantized_are_plain_weights(is_offloaded, tmp_path):
    model = fp8_model(tmp_path)
    assert type(find_mlps(model)[0].gate) is nn.Linear
    check_output(cpu_offload(model) if is_offloaded else model, method="griffin")


@pytest.mark.parametrize("fields", [*METHODS.values(), {"draft_dtype": "int8", "density": 1.0}])
def test_layers_that_keep_the_blocks_of_a_gguf_file(fields, monkeypatch):
    """As transformers has them where it has a kernel for this device; here by torch."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install hf_sirius[real]")
    utils = pytest.importorskip("transformers.integrations.gguf.utils", reason="this transformers unpacks GGUF files")
    from transformers.integrations.gguf import dequant, kernels

    kind = gguf.GGMLQuantizationType.Q8_0

    class Kernel:
        @staticmethod
        def mul_mat_vec(weight, inputs, ggml_type, out_features):
            return inputs.float() @ dequant.dequantize(weight, ggml_type, torch.float32).reshape(out_features, -1).T

    def blocks_of(dense: nn.Linear) -> nn.Module:
        layer = utils.GgufLinear(dense.in_features, dense.out_features, int(kind), dense.bias is not None)
        layer.weight.data = torch.from_numpy(gguf.quants.quantize(dense.weight.detach().numpy(), kind))
        if dense.bias is not None:
            layer.bias.data = dense.bias.data
        return layer

    monkeypatch.setattr(kernels, "_gguf_kernel", Kernel)
    model = pack(build_model(dtype=torch.float32, mlp_bias=True), blocks_of)
    gate = find_mlps(model)[0].gate
    expected = dequant.dequantize(gate.weight, int(kind), torch.float32).reshape(gate.out_features, -1)
    assert torch.equal(dense_weight(gate), expected)
    check_output(model, **fields)


# torchao


@pytest.fixture(params=["8 bits", "4 bits"])
def torchao_model(request, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    from transformers import TorchAoConfig

    build_model(dtype=torch.float32, mlp_bias=True).save_pretrained(tmp_path)
    config = quantization.Int8WeightOnlyConfig()
    if request.param == "4 bits":
        granularity = quantization.granularity.PerGroup(32)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    return AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(config), dtype=torch.float32
    )


def test_a_model_quantized_by_torchao(torchao_model):
    gate = find_mlps(torchao_model)[0].gate
    torch.testing.assert_close(dense_weight(gate), gate.weight.dequantize(), rtol=0, atol=1e-6)
    for draft_dtype in DTYPES:
        for fields in METHODS.values():
            check_output(torchao_model, draft_dtype=draft_dtype, **fields)


def test_a_change_of_a_torchao_weight_reaches_the_casts(torchao_model):
    gate = find_mlps(torchao_model)[0].gate
    with make_sparse(torchao_model, density=1.0, draft_dtype="bfloat16") as twin:
        before = cast_of(gate, twin)
        assert cast_of(gate, twin) is before
        gate.weight.scale.mul_(2)
        torch.testing.assert_close(cast_of(gate, twin).linear.weight, before.linear.weight * 2)


# What is counted


def test_packed_numbers_count_as_what_they_stand_for():
    layer = PackedLayer(nn.Linear(64, 48))
    model = packed_model()
    assert projections.projection_shape(layer) == (48, 64)
    site = find_mlps(model)[0]
    assert (
        site.num_parameters() == sum(math.prod(projections.projection_shape(part)) for part in site.parts) + 64 * 2 + 32
    )
