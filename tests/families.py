"""Model families as tiny random models: what of each config differs from the common values."""

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

# model type -> fields that differ; a field that is None here is left out of the config
FAMILIES = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bloom": {},
    "codegen": {**GPT, "rotary_dim": 8},
    "cohere": {},
    "cohere2": WINDOW,
    "cwm": WINDOW,
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": WINDOW,
    "falcon": {"head_dim": None},
    "gemma": {},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 8},
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
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {},
    "internlm3": {},
    "jais2": {},
    "llama": {},
    "ministral": WINDOW,
    "ministral3": {},
    "mistral": WINDOW,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256, "expansion_ratio": 2, "use_cache": True},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": WINDOW,
    "vaultgemma": {**WINDOW, "query_pre_attn_scalar": 8},
}


def available_families() -> list[str]:
    """Returns the families that the installed transformers has."""
    return [family for family in FAMILIES if family in CONFIG_MAPPING]


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides) -> PreTrainedModel:
    """Returns a random model of a family, in eval mode; overrides go into its config."""
    left_out = {name for name, value in FAMILIES[family].items() if value is None}
    fields = {name: value for name, value in {**COMMON, **FAMILIES[family]}.items() if name not in left_out}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields, **overrides))
    return model.to(dtype).eval()
