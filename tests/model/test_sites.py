"""`find_mlps`: where each family keeps its MLPs, and which models it refuses."""

import pytest
import torch
from tiny import build_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sirius.model.sites import find_mlps, neuron_weight, part_of


HIDDEN_SIZE, NUM_NEURONS, VOCAB_SIZE = 32, 64, 48
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": NUM_NEURONS, "pad_token_id": 0}  # fmt: skip


def build_meta_model(family: str, **fields):
    """Returns a model without weights: finding MLPs needs none."""
    config = AutoConfig.for_model(family, **{**SIZES, **fields})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


# family: (fields, the owners' names with {} for the layer, gate, up, down, activation)
FAMILIES = {
    "llama": ({}, "model.layers.{}.mlp", "gate_proj", "up_proj", "down_proj", "act_fn"),
    "phi3": ({}, "model.layers.{}.mlp", "gate_up_proj", None, "down_proj", "activation_fn"),
    "nemotron": ({}, "model.layers.{}.mlp", "up_proj", None, "down_proj", "act_fn"),
    "opt": ({"ffn_dim": NUM_NEURONS, "word_embed_proj_dim": HIDDEN_SIZE}, "model.decoder.layers.{}", "fc1", None, "fc2",
            "activation_fn"),
    "gptj": ({"n_inner": NUM_NEURONS, "rotary_dim": 4}, "transformer.h.{}.mlp", "fc_in", None, "fc_out", "act"),
    "gpt2": ({"n_inner": NUM_NEURONS}, "transformer.h.{}.mlp", "c_fc", None, "c_proj", "act"),
    "gpt_neox": ({}, "gpt_neox.layers.{}.mlp", "dense_h_to_4h", None, "dense_4h_to_h", "act"),
    "falcon": ({"ffn_hidden_size": NUM_NEURONS}, "transformer.h.{}.mlp", "dense_h_to_4h", None, "dense_4h_to_h", "act"),
    "bloom": ({}, "transformer.h.{}.mlp", "dense_h_to_4h", None, "dense_4h_to_h", "gelu_impl"),
    "bert": ({"is_decoder": True}, "bert.encoder.layer.{}", "intermediate.dense", None, "output.dense",
             "intermediate.intermediate_act_fn"),
    "ctrl": ({"dff": NUM_NEURONS}, "transformer.h.{}", "ffn.0", None, "ffn.2", "ffn.1"),
    "modernbert-decoder": ({}, "model.layers.{}.mlp", "Wi", None, "Wo", "act"),
    "lfm2": ({"block_auto_adjust_ff_dim": False}, "model.layers.{}.feed_forward", "w1", "w3", "w2", ""),
    "moshi": ({"ffn_dim": 2 * NUM_NEURONS}, "model.layers.{}.mlp", "fc1", None, "fc2", "activation_fn"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mlp_is_found_in_order(family):
    fields, name, gate, up, down, activation = FAMILIES[family]
    model = build_meta_model(family, **fields)
    sites = find_mlps(model)
    num_neurons = 4 * HIDDEN_SIZE if family == "bloom" else NUM_NEURONS  # BLOOM's is not configurable
    assert [site.idx for site in sites] == [0, 1]
    for layer, site in enumerate(sites):
        owner = model.get_submodule(name.format(layer))
        assert site.name == name.format(layer) and site.owner is owner
        assert site.gate is owner.get_submodule(gate) and site.down is owner.get_submodule(down)
        assert site.up is (owner.get_submodule(up) if up else None)
        assert site.activation == activation and (activation == "" or callable(part_of(owner, activation)))
        assert site.num_neurons == num_neurons


def test_experts_that_are_not_called_with_a_routing_are_refused():
    model = build_meta_model("jetmoe", kv_channels=8, num_local_experts=4)
    with pytest.raises(ValueError, match=r"JetMoeForCausalLM has mixture-of-experts blocks that .*input_linear"):
        find_mlps(model)


def test_experts_that_are_modules_of_their_own_are_refused():
    model = build_model()
    model.model.layers[1].mlp.experts = nn.ModuleList([model.model.layers[0].mlp])
    with pytest.raises(ValueError, match=r"modules of their own \(first 'model.layers.1.mlp.experts'\)"):
        find_mlps(model)


def test_models_without_a_known_mlp_are_refused():
    model = build_model()
    for block in model.model.layers:
        del block.mlp.act_fn
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no MLP of a known kind.*gate_proj/up_proj/down"):
        find_mlps(model)


def test_an_unknown_mlp_is_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.back = nn.Linear(HIDDEN_SIZE, NUM_NEURONS), nn.Linear(NUM_NEURONS, HIDDEN_SIZE)

        def forward(self, hidden_states):
            return self.back(self.wide(hidden_states).relu())

    model = build_model()
    for block in model.model.layers:
        block.mlp = Block()
    with pytest.raises(ValueError) as caught:
        find_mlps(model)
    told = str(caught.value)
    assert "model.layers.0.mlp is a " in told and ".Block, with the projections wide [64, 32], back [32, 64]" in told
    assert "intermediate.dense/output.dense" in told and "MLP_KINDS in hf_sirius.model.sites" in told


def test_a_projection_of_an_unknown_type_is_refused_by_name():
    model = build_meta_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.up_proj = nn.Sequential(mlp.up_proj)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj is a .*Sequential; .*Linear"):
        find_mlps(model)


def test_a_subclass_of_linear_is_a_linear():
    class MyLinear(nn.Linear):
        pass

    model = build_meta_model("llama")
    model.model.layers[0].mlp.gate_proj = MyLinear(HIDDEN_SIZE, NUM_NEURONS, bias=False, device="meta")
    assert len(find_mlps(model)) == 2


def test_of_a_vision_language_model_only_the_language_model_is_sparse():
    text = {name: SIZES[name] for name in SIZES if name != "pad_token_id"} | {"head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [site.name for site in find_mlps(model)] == [f"model.language_model.layers.{i}.mlp" for i in range(2)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neuron_weight_is_a_view_by_neuron(family):
    gate = find_mlps(build_model(family))[0].gate
    weight = neuron_weight(gate)
    assert weight.shape == (NUM_NEURONS, HIDDEN_SIZE) and weight.data_ptr() == gate.weight.data_ptr()
    hidden_state = torch.randn(HIDDEN_SIZE, dtype=weight.dtype)
    torch.testing.assert_close(gate(hidden_state), weight @ hidden_state + (0 if gate.bias is None else gate.bias))


@pytest.mark.parametrize("num_kept", [1, 16, 63, NUM_NEURONS])
@pytest.mark.parametrize(
    "family, fields, num_up, has_bias",
    [("llama", {}, 1, False), ("llama", {"mlp_bias": True}, 1, True), ("phi3", {}, 1, False),
     ("opt", FAMILIES["opt"][0], 0, True), ("gpt2", FAMILIES["gpt2"][0], 0, True)],
    ids=["gated", "gated with biases", "fused", "plain", "Conv1D"],
)  # fmt: skip
def test_parameters_read_against_a_count_by_hand(family, fields, num_up, has_bias, num_kept):
    site = find_mlps(build_meta_model(family, **fields))[0]
    row = HIDDEN_SIZE + has_bias  # of gate or up
    down = HIDDEN_SIZE * num_kept + HIDDEN_SIZE * has_bias
    share = num_kept / NUM_NEURONS
    griffin = num_kept * row * (1 + num_up) + down
    cats = NUM_NEURONS * row + num_kept * row * num_up + down
    assert site.num_parameters_read(share, gate_in_full=False) == pytest.approx(griffin)
    assert site.num_parameters_read(share, gate_in_full=True) == pytest.approx(cats)
    if num_kept == NUM_NEURONS:
        assert site.num_parameters() == griffin == cats
