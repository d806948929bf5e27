"""Mixtures of experts as tiny random models: what of each config differs from the common values."""

import torch
from families import COMMON, MIXED, MLA, WINDOW
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.aria import modeling_aria
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
IS_OLDER = hasattr(modeling_aria, "AriaGroupedExpertsGemm")  # than the transformers that the tests are written for
TWO_LAYERS = {**WINDOW, "layer_types": MIXED["layer_types"][:2]}

# model type -> fields that differ; a field that is None here is left out of the config
MIXTURES = {
    "afmoe": {},
    "aria_text": {"moe_num_experts": 6, "moe_topk": 4},
    "axk1": MLA,
    "cohere2_moe": TWO_LAYERS,
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 4, "vocab_size_per_layer_input": 99,
                    "hidden_size_per_layer_input": 8, **TWO_LAYERS},
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "kolibri1": {},
    "laguna": {},
    "longcat_flash": {**MLA, "expert_ffn_hidden_size": 20, "ffn_hidden_size": 40, "moe_topk": 4, "zero_expert_num": 2,
                      "num_layers": 2, "num_hidden_layers": None},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax_m2": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "qwen3_moe": {},
    "solar_open": {},
}  # fmt: skip


def available_mixtures() -> list[str]:
    """Returns the families that the installed transformers has."""
    left_out = {"aria_text"} if IS_OLDER else set()  # whose experts were not fused before
    return [family for family in MIXTURES if family in CONFIG_MAPPING and family not in left_out]


def tiny_mixture(family: str, dtype: torch.dtype = torch.float64, implementation: str = "eager", **overrides):
    """Returns a random model of a family, in eval mode; overrides go into its config."""
    own = MIXTURES[family]
    fields = {name: value for name, value in {**SIZES, **own}.items() if value is not None or name not in own}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**fields, **overrides})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    return model.to(dtype).eval()
