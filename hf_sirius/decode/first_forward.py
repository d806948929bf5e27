"""What the first forward of a call reads: the tokens that no KV-cache holds yet."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..model.compat import IS_5_17
from ..model.encoder_decoder import text_input


def new_tokens_only(
    model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict, mask_length: int | None
) -> Callable[[dict], dict]:
    """Keeps the stock loop's first forward from reading again what a carried-over KV-cache already holds.

    Works around transformers 5.17 to 5.23, where assisted decoding hands the whole sequence to its first forward
    (plain `generate` slices it in `_prefill`). To go when that is mended there: the length is then right and nothing is
    sliced.
    """
    past_length, length = model_kwargs["past_key_values"].get_seq_length(), input_ids.shape[1]
    mask_length = length if model.config.is_encoder_decoder else mask_length  # else that of the encoder's mask
    if (attention_mask := model_kwargs.get(text_input(model, "attention_mask"))) is not None:
        mask_length = attention_mask.shape[1]
    embeddings_name = text_input(model, "inputs_embeds")
    if (embeddings := model_kwargs.get(embeddings_name)) is not None:  # which are always those of the whole sequence
        length = mask_length = embeddings.shape[1]

    def sliced(inputs: dict) -> dict:
        if inputs.get(embeddings_name) is not None:
            inputs[embeddings_name] = inputs[embeddings_name][:, past_length:]
        for name in ("input_ids", "position_ids", "token_type_ids"):
            value = inputs.get(name := text_input(model, name))
            if value is not None and value.shape[-1] == length:
                inputs[name] = value[..., past_length:]
        return inputs

    if past_length >= length == mask_length:
        # Plain `generate` reads all of it again, behind what the cache holds.
        if IS_5_17 or attention_mask is not None:
            raise ValueError(
                f"the KV-cache holds {past_length} tokens, and input_ids no others: pass the sequence with new tokens "
                "behind them, or crop the cache by one token, which is then read again"
            )
        return lambda inputs: inputs
    return sliced if past_length and length == mask_length else lambda inputs: inputs


def num_tokens_of(model: PreTrainedModel, inputs: dict) -> int:
    """Returns how many tokens a forward with these inputs reads."""
    embeddings = inputs.get(text_input(model, "inputs_embeds"))
    return (inputs[text_input(model, "input_ids")] if embeddings is None else embeddings).shape[1]


def mask_of_new_tokens(model: PreTrainedModel, model_kwargs: dict) -> torch.Tensor | None:
    """Returns the attention mask of the tokens that the first forward reads, long [batch_size, num_new_tokens]."""
    attention_mask = model_kwargs.get(text_input(model, "attention_mask"))
    cache = model_kwargs.get("past_key_values")
    if attention_mask is None or cache is None:
        return attention_mask
    return attention_mask[:, cache.get_seq_length() :]
