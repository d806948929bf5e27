"""Model families as tiny random models: what of each config differs from the common values."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 256}
WINDOW = {"sliding_window": 8}  # shorter than the prompt of the tests
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

# model type -> fields that differ; a field that is None here is left out of the config
FAMILIES = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bloom": {"initializer_range": 0.1},  # more makes it repeat one token
    "codegen": {**GPT, "rotary_dim": 8},
    "cohere": {},
    "cohere2": MIXED,
    "cwm": WINDOW,
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": MIXED,
    "falcon": {"head_dim": None},
    "gemma": {},
    "gemma2": {**MIXED, "query_pre_attn_scalar": 8},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 8},
    "gemma4_text": {**MIXED, "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8},
    "glm": {},
    "glm4": {},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_neox_japanese": {},
    "gptj": {**GPT, "rotary_dim": 8},
    "granite": {},
    "granite_swa": MIXED,
    "helium": {},
    "hunyuan_v1_dense": {},
    "hrm_text": {},
    "hyperclovax": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "llama": {},
    "minicpm3": MLA,
    "ministral": MIXED,
    "ministral3": {},
    "mistral": WINDOW,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256, "expansion_ratio": 2, "use_cache": True},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {**MIXED, "use_sliding_window": True},
    "qwen3": {**MIXED, "use_sliding_window": True},
    "seed_oss": {},
    "smollm3": {**MIXED, "use_sliding_window": True},
    "stablelm": {},
    "starcoder2": WINDOW,
    "vaultgemma": {**MIXED, "query_pre_attn_scalar": 8},
    "youtu": MLA,
}

# One of each kind: windows, fused projections, ALiBi, tables of positions, latent attention, norms elsewhere.
OFTEN = (
    "bloom", "cohere2", "doge", "falcon", "gemma4_text", "gpt_neo", "llama", "minicpm3", "olmo2", "opt", "phi3",
)  # fmt: skip


def available_families() -> list[str]:
    """Returns the families that the installed transformers has."""
    return [family for family in FAMILIES if family in CONFIG_MAPPING]


def every_family() -> list:
    """Returns these as parameters of a test, which is slow but for the ones of `OFTEN`."""
    return [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in available_families()]


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides) -> PreTrainedModel:
    """Returns a random model of a family, in eval mode; overrides go into its config."""
    own = FAMILIES.get(family, {})
    fields = {name: value for name, value in {**COMMON, **own}.items() if value is not None or name not in own}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, **overrides}))
    return model.to(dtype).eval()
