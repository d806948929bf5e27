"""Families with recurrent layers, as tiny random models: what of each config differs from the common values."""

import torch
from families import COMMON as OF_ALL
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_sirius.model.compat import IS_5_17


VOCAB_SIZE = 64
COMMON = {**OF_ALL, "vocab_size": VOCAB_SIZE, "intermediate_size": 48, "num_hidden_layers": 4}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MAMBA_2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
MAMBA_1 = {
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}

# model type -> fields that differ; a field that is None here is left out of the config
HYBRIDS = {
    "bamba": {**MAMBA_2, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA_2, "mamba_d_ssm": 64},
    "jamba": {**MAMBA_1, "num_experts": 1, "num_experts_per_tok": 1, "mamba_dt_rank": 4},
    "kimi_linear": {
        "first_k_dense_replace": 4,  # so that no layer has experts
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
            "num_heads": 2,
            "head_dim": 16,
            "short_conv_kernel_size": 3,
        },
        "layer_types": DELTA["layer_types"],
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "conv_kernel": 3,
        "chunk_size": 4,
        "n_groups": 1,
    },
    "olmo_hybrid": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_next": {**DELTA, "mlp_only_layers": [0, 1, 2, 3]},
    "zamba": {**MAMBA_1, "n_mamba_heads": 2, "num_key_value_heads": 4},
    "zamba2": {
        "mamba_d_state": 8,
        "mamba_d_conv": 3,
        "n_mamba_heads": 4,
        "chunk_size": 4,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "adapter_rank": 4,
    },
}
# What is refused, with a word of why.
REFUSED = {
    "mamba": ({"state_size": 8, "conv_kernel": 3}, "no attention at all"),
    "mamba2": (
        {"num_heads": 4, "head_dim": 16, "state_size": 8, "conv_kernel": 3, "chunk_size": 4, "n_groups": 1},
        "no attention at all",
    ),
    "recurrent_gemma": ({"head_dim": None, "lru_width": 32}, "(outside of|beside) the KV-cache"),
}


def available_hybrids() -> list[str]:
    """Returns the families that the installed transformers has, and takes back."""
    # 5.17 gives layers with an MLP alone a state, which its crop does not find.
    newer = {"nemotron_h"} if IS_5_17 else set()
    return [family for family in HYBRIDS if family in CONFIG_MAPPING and family not in newer]


def tiny_hybrid(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, own: dict | None = None, **overrides
) -> PreTrainedModel:
    """Returns a random model of a family, in eval mode; overrides go into its config."""
    own = HYBRIDS[family] if own is None else own
    fields = {name: value for name, value in {**COMMON, **own}.items() if value is not None or name not in own}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, **overrides}))
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()
