"""Models that read more than their text: how the inputs of an encoder-decoder's text are named, what of a decoder no
draft step passes, and made-up inputs.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .projections import is_projection, projection_shape


# How families name the attention to the encoder's states, and in it what makes keys and values of them.
CROSS_ATTENTIONS = (
    "encoder_attn", "EncDecAttention", "cross_attn", "cross_attention", "crossattention", "encoder_decoder_attention",
)  # fmt: skip
# What `get_decoder` has beside the text, in Phi-4-multimodal and GIT: towers for images and audio.
TOWERS = ("embed_tokens_extend", "image_encoder", "visual_projection")
KEYS_AND_VALUES = ("k_proj", "v_proj", "k", "v", "key", "value", "key_proj", "value_proj")
_NUM_STATES = 8  # of a made-up encoder output


def text_input(model: PreTrainedModel, name: str) -> str:
    """Returns what a model calls an input of its text, such as `"input_ids"`: of an encoder-decoder the decoder's."""
    return f"decoder_{name}" if model.config.is_encoder_decoder else name


def read_once(model: PreTrainedModel) -> set[nn.Module]:
    """Returns the modules of a decoder that the prompt alone passes, and no draft step: towers of images and audio, and
    the projections of an encoder-decoder that read the encoder's states, as what they make is kept in the KV-cache.
    """
    decoder = model.get_decoder()
    if not model.config.is_encoder_decoder:
        towers = (tower for name, tower in decoder.named_modules() if name.rpartition(".")[2] in TOWERS)
        return {module for tower in towers for module in tower.modules()}
    return {
        part
        for name, attention in decoder.named_modules()
        if name.rpartition(".")[2] in CROSS_ATTENTIONS
        for part_name, part in attention.named_modules()
        if part_name.rpartition(".")[2] in KEYS_AND_VALUES and is_projection(part)
    }


def encoder_states(model: PreTrainedModel, batch_size: int) -> torch.Tensor:
    """Returns made-up states of an encoder, [batch_size, num_states, hidden_size]."""
    widths = {projection_shape(part)[1] for part in read_once(model)}  # of the keys and values
    width = max(widths, default=model.config.get_text_config(decoder=True).hidden_size)
    states = torch.randn(1, _NUM_STATES, width, generator=torch.Generator().manual_seed(0))
    return states.to(model.dtype).expand(batch_size, -1, -1)


def text_inputs(model: PreTrainedModel, input_ids: torch.LongTensor) -> dict[str, Any]:
    """Returns the inputs of a forward that reads made-up text, long [batch_size, length]; an encoder-decoder reads it
    beside made-up states of its encoder, which does not run.
    """
    if not model.config.is_encoder_decoder:
        return {"input_ids": input_ids}
    states = encoder_states(model, len(input_ids)).to(input_ids.device)
    return {"decoder_input_ids": input_ids, "encoder_outputs": BaseModelOutput(last_hidden_state=states)}
