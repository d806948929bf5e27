"""Makes the embedded reasoner larger: a model that computes the same logits with more weights."""

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from ..reasoner import reasoner_path


def widen(model: LlamaForCausalLM, hidden_factor: int, neuron_factor: int) -> LlamaForCausalLM:
    """Returns a larger model that computes the same logits, so that speed and acceptance are measured on one model.

    Hidden units and heads are repeated `hidden_factor` times, and neurons `neuron_factor` times; each product is
    divided by the number of times that its terms repeat. RMSNorm stays as it is: a mean does not change.

    Args:
        model: a Llama. The larger model has a head of its own, even if that of this one is tied to the embedding.
        hidden_factor, neuron_factor: at least 1.
    """
    if hidden_factor < 1 or neuron_factor < 1:
        raise ValueError(f"the factors must be at least 1, got {hidden_factor} and {neuron_factor}")
    config = type(model.config).from_dict(model.config.to_dict())
    config.head_dim = model.model.layers[0].self_attn.head_dim
    config.hidden_size *= hidden_factor
    config.num_attention_heads *= hidden_factor
    config.num_key_value_heads *= hidden_factor
    config.intermediate_size *= neuron_factor
    config.tie_word_embeddings = False
    with torch.device("meta"):
        wide = type(model)(config)
    wide = wide.to(model.dtype).to_empty(device=model.device).eval()
    narrow_state = {**model.state_dict(), "lm_head.weight": model.lm_head.weight}
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            weight = narrow_state[name]
            repeats = [new // old for new, old in zip(parameter.shape, weight.shape, strict=True)]
            is_product = weight.ndim == 2 and "embed_tokens" not in name
            parameter.copy_(weight.repeat(repeats) / (repeats[1] if is_product else 1))
    # Rotary frequencies are no parameters: they depend on head_dim alone.
    wide.model.rotary_emb = type(wide.model.rotary_emb)(config).to(model.device)
    wide.generation_config = model.generation_config
    return wide


def wide_reasoner(hidden_factor: int, neuron_factor: int, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the reasoner, widened as [`widen`] does."""
    narrow = AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype=torch.float32)
    return widen(narrow, hidden_factor, neuron_factor).to(dtype)
