"""Mixtures of experts as tiny random models: what of each config differs from the common values."""

import torch
from families import COMMON, MIXED, MLA, WINDOW
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


SIZES = {
    **COMMON,
    "num_hidden_layers": 2,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
TWO_LAYERS = {**WINDOW, "layer_types": MIXED["layer_types"][:2]}

# model type -> fields that differ; a field that is None here is left out of the config
MIXTURES = {
    "afmoe": {},
    "axk1": MLA,
    "cohere2_moe": TWO_LAYERS,
    "dbrx": {},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {},
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "laguna": {},
    "longcat_flash": {},
    "mellum": {},
    "minimax_m2": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "solar_open": {},
    "aria_text": {},
    "axk2": {},
    "beam": {},
    "dots3_note_text": {},
    "mimo_v2_flash": {},
    "deepseek_v4": {},
    "deepseek_v32": {},
    "glm_moe_dsa": {},
    "kolibri1": {},
    "zaya": {},
    "hy_v4": {},
    "jetmoe": {},
    "llama4_text": {},
    "minimax_m3_vl_text": {},
    "inkling_text": {},
    "inkling2_text": {},
    "qwen4_exp_text": {},
}


def available_mixtures() -> list[str]:
    """Returns the families that the installed transformers has."""
    return [family for family in MIXTURES if family in CONFIG_MAPPING]


def tiny_mixture(family: str, dtype: torch.dtype = torch.float64, implementation: str = "eager", **overrides):
    """Returns a random model of a family, in eval mode; overrides go into its config."""
    own = MIXTURES[family]
    fields = {name: value for name, value in {**SIZES, **own}.items() if value is not None or name not in own}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**fields, **overrides})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    return model.to(dtype).eval()
