"""A tiny random model of any family: the fields of its config, made small by their names."""

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


# What numbers are by their names, of which the first that fits holds. A smaller one stays.
SIZES = (
    (r"index_topk", 256),  # of fewer tokens many score the same, which is zero
    (r"\w*vocab_size\w*|n_vocab|\w*_vocab", 99),
    (
        r"\w*(intermediate_(size|dim)|ffn_(dim|size|hidden_size)|mlp_dim)\w*|n_inner|d_ff|dim_ff|dff",
        64,
    ),
    (r"\w*kv_heads|\w*key_value_heads|multi_query_group_num|num_query_groups", 2),
    (r"\w*heads?|\w*num_attention_heads\w*", 4),
    (r"\w*(head_dim|head_size|kv_channels)|d_kv|dim_head", 8),
    (r"\w*layers?|depth|num_blocks", 2),
    (r"n_positions|n_ctx|\w*max_position\w*|max_seq_len(gth)?|max_\w*_positions|seq_len(gth)?", 256),
    (r"hidden_size_per_layer_input|\w*_rank|rotary_dim", 8),
    (r"\w*(per_tok|per_token|top_?k|topk_group|n_group|num_selected_experts)|moe_k", 2),
    (r"\w*experts?", 4),
    (r"hidden_size|n_embd|d_model|\w*embed\w*(dim|size)?|\w*_hidden_size|\w*_dim|dim", 32),
    (r"\w*window\w*|attention_chunk_size", 8),
    (r"query_pre_attn_scalar", 8),
    (r"image_size|input_size", 28),
    (r"patch_size", 14),
)
STDS = ("initializer_range", "init_std", "initializer_std", "embed_init_std")
IDS = re.compile(r"\w*(token_id|token_index|_idx)|(boi|eoi|image|video|audio)_\w*id")
FIELDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What a family cannot be built small, or be told apart, without.
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 2},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": None,
        "intermediate_size": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "moshi": {"sliding_window": 256},  # its masks know of none
    "mpt": {"use_cache": True, "expansion_ratio": 2},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False},
    "zamba": {"n_mamba_heads": 2, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"n_mamba_heads": 4, "mamba_headdim": 16, "attention_hidden_size": 64, "attention_head_dim": 16},
    "xlnet": {"d_inner": 64, "d_head": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


def smaller(config: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a default config that are to be others in a small one."""
    known = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    fields: dict[str, Any] = {}
    layer_types = known.get("layer_types") or known.get("layers_block_type")
    num_layers = known.get("num_hidden_layers") or 0
    # As many layers as have all types of them.
    few = next((n for n in range(2, 9) if set(layer_types[:n]) == set(layer_types)), 2) if layer_types else 2
    for name, value in known.items():
        size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
        if isinstance(value, PreTrainedConfig):
            fields[name] = {**smaller(value, own.get(name, {})), "model_type": value.model_type}
        elif isinstance(value, (list, tuple)) and len(value) == num_layers > 2:
            fields[name] = [min(size, item) if size and type(item) is int else item for item in value[:few]]
        elif name in FIELDS:
            fields[name] = FIELDS[name]
        elif type(value) is int and IDS.fullmatch(name) and value > 80:
            fields[name] = 80 + len(fields) % 15
        elif type(value) is int and size is not None:
            fields[name] = min(size, value)
        elif name in STDS:
            fields[name] = 0.3
        elif name == "head_dim" and value is None:
            fields[name] = 8
    if "num_hidden_layers" in fields:
        fields["num_hidden_layers"] = few
    heads, kv_heads = known.get("num_attention_heads"), known.get("num_key_value_heads")
    if heads is not None and heads == kv_heads:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return {
        **fields,
        **{name: value for name, value in own.items() if not isinstance(value, dict) or name not in fields},
    }


def small_config(family: str, is_decoder: bool) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[family]
    fields = smaller(config_class(), OWN.get(family, {}))
    if is_decoder and hasattr(config_class(), "is_decoder"):
        fields["is_decoder"] = True
    return config_class(**fields)


def tiny_model(family: str, auto_class: type, seed: int = 0) -> PreTrainedModel:
    """Returns a random model of a family in float64, in eval mode."""
    config = small_config(family, is_decoder=auto_class is AutoModelForCausalLM)
    torch.manual_seed(seed)
    model = auto_class.from_config(config, dtype=torch.float64, experts_implementation="eager")
    return model.double().eval()


def tiny_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Returns what a forward takes: 24 random tokens, and of an encoder-decoder as many for each."""
    vocab_size = model.config.get_text_config().vocab_size
    token_ids = torch.randint(3, min(vocab_size, 80), (2, 1, 24), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": token_ids[0]}
    return {**inputs, "decoder_input_ids": token_ids[1]} if model.config.is_encoder_decoder else inputs
