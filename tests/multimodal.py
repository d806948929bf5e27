"""Models that read images or audio beside text, as tiny random models, and what they read."""

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel


IMAGE, START = 60, 59  # ids of tokens that stand for an image or audio, and begin it
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {"model_type": "llama", **TEXT}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN = {"depth": 1, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
AUDIO = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 20,
}  # fmt: skip
PIXELS = (1, 3, 28, 28)
# model type -> (config, how many tokens stand for the image or audio, shapes of the encoder's inputs)
FAMILIES = {
    "gemma3": (
        {
            "text_config": {**TEXT, "query_pre_attn_scalar": 8, "sliding_window": 8},
            "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": IMAGE,
        }, 4, {"pixel_values": PIXELS},
    ),
    "idefics3": (
        {"text_config": LLAMA, "vision_config": VISION, "scale_factor": 2, "image_token_id": IMAGE},
        1, {"pixel_values": (1, *PIXELS)},
    ),
    "llava": (
        {
            "text_config": LLAMA, "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": IMAGE,
        }, 4, {"pixel_values": PIXELS},
    ),
    "paligemma": (
        {
            "text_config": {"model_type": "gemma", **TEXT}, "projection_dim": 32, "image_token_index": IMAGE,
            "vision_config": {"model_type": "siglip_vision_model", **VISION, "projection_dim": 32},
        }, 4, {"pixel_values": PIXELS},
    ),
    "qwen2_audio": (
        {
            "text_config": {"model_type": "qwen2", **TEXT}, "audio_token_index": IMAGE,
            "audio_config": {"model_type": "qwen2_audio_encoder", **AUDIO},
        }, 10, {"input_features": (1, 8, 40)},
    ),
    "qwen2_vl": (
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {**QWEN, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
            "image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": 58, "video_token_id": 57,
        }, 1, {"pixel_values": (4, 3 * 2 * 14 * 14)},
    ),
    "qwen3_vl": (
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {
                **QWEN, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32,
                "deepstack_visual_indexes": [], "num_position_embeddings": 16,
            },
            "image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": 58, "video_token_id": 57,
        }, 1, {"pixel_values": (4, 3 * 2 * 14 * 14)},
    ),
}  # fmt: skip


def tiny_multimodal(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Returns a random model of a family, in eval mode."""
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family][0]))
    return model.to(dtype).eval()


def tiny_prompt(family: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Returns a prompt in whose midst an image or audio stands."""
    _, num_tokens, shapes = FAMILIES[family]
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(3, 50, (9,), generator=generator).tolist()
    input_ids = torch.tensor([[*text[:3], START, *[IMAGE] * num_tokens, *text[3:]]])
    prompt = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    prompt |= {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    if family.startswith("qwen") and "pixel_values" in shapes:
        prompt |= {"image_grid_thw": torch.tensor([[1, 2, 2]]), "mm_token_type_ids": (input_ids == IMAGE).long()}
    if "input_features" in shapes:
        prompt["feature_attention_mask"] = torch.ones(1, shapes["input_features"][-1], dtype=torch.long)
    return prompt
