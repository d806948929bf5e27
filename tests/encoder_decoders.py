"""Encoder-decoders as tiny random models: what of each config differs from the common values."""

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, PreTrainedModel


COMMON = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 2,
}
T5 = {"d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 4}
SPEECH = {"max_source_positions": 20, "max_target_positions": 64}
# model type -> fields that differ
FAMILIES = {
    "bart": {},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blenderbot": {},
    "blenderbot-small": {},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "longt5": T5,
    "m2m_100": {},
    "marian": {},
    "mbart": {},
    "mt5": T5,
    "mvp": {},
    "pegasus": {},
    "pegasus_x": {},
    "plbart": {},
    "speech_to_text": {**SPEECH, "input_feat_per_channel": 8},
    "t5": {**T5, "feed_forward_proj": "gelu"},
    "umt5": T5,
    "whisper": {**SPEECH, "num_mel_bins": 8, "suppress_tokens": None, "begin_suppress_tokens": None},
}


def tiny_encoder_decoder(family: str, dtype: torch.dtype = torch.float64, **overrides) -> PreTrainedModel:
    """Returns a random model of a family that writes varied tokens, in eval mode; overrides go into its config."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})
    auto = AutoModelForSpeechSeq2Seq if "max_source_positions" in FAMILIES[family] else AutoModelForSeq2SeqLM
    model = auto.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def tiny_source(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns what the encoder of such a model reads."""
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.randint(3, model.config.vocab_size, (1, 9), generator=generator)}
    shape = (1, 8, 40) if model.config.model_type == "whisper" else (1, 40, 8)  # channels are first, or last
    return {"input_features": torch.randn(shape, generator=generator).to(model.dtype)}
