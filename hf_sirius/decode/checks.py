"""What a call cannot ask of a twin, and what it asks in vain."""

import warnings

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    SynthIDTextWatermarkLogitsProcessor,
)

from ..settings.config import SiriusConfig


# By which the loop makes the inputs of its forwards.
_INPUT_METHODS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
# Settings of stock assistants: what they are where nobody sets them, and what to do.
_IGNORED = {
    "num_assistant_tokens": (20, "set kernel_size in make_sparse"),
    "num_assistant_tokens_schedule": ("constant", "set kernel_size='auto' in make_sparse"),
    "assistant_confidence_threshold": (0.4, "set draft_confidence in make_sparse"),
    "assistant_early_exit": (None, "leave one of the two out"),
    "use_mtp": (False, "leave one of the two out"),
}


def check_call(
    model: PreTrainedModel,
    config: SiriusConfig,
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
) -> None:
    """Raises `ValueError` for what a call cannot ask of a twin, and warns of what it asks in vain."""
    _check_model(model)
    if generation_config.assistant_ensemble_weight is not None:
        raise ValueError(
            "assistant_ensemble_weight blends the draft's probabilities into the model's, while a sparse twin is "
            "verified by its likelihood threshold: leave assistant_ensemble_weight out and lower SiriusConfig.threshold"
        )
    if generation_config.guidance_scale not in (None, 1):
        raise ValueError(
            f"guidance_scale={generation_config.guidance_scale} runs the model over a KV-cache of its own, in which "
            "drafts cannot be undone: leave guidance_scale out, or generate without the twin"
        )
    if any(isinstance(processor, SynthIDTextWatermarkLogitsProcessor) for processor in logits_processor):
        raise ValueError(
            "SynthID's watermark counts every token that it is asked about, of which some are rolled back: use a "
            "WatermarkingConfig, which counts none, or generate without the twin"
        )
    if config.tree_width > 1 and generation_config.do_sample:
        raise ValueError(
            f"tree_width={config.tree_width} was given with do_sample=True, but a tree keeps the likeliest of its "
            "branches, which would skew the distribution: use tree_width=1 to sample, or do_sample=False (a pipeline "
            "samples unless it is told so)"
        )
    for name, (unset, instead) in _IGNORED.items():
        if (value := getattr(generation_config, name, None)) not in (None, unset):
            warnings.warn(f"{name}={value!r} is ignored beside a sparse twin: {instead}", UserWarning, stacklevel=2)


def _check_model(model: PreTrainedModel) -> None:
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} is in training with gradient checkpointing, which turns the KV-cache off: "
            "call model.eval() before generate, and model.train() behind it"
        )
    for name in _INPUT_METHODS:
        laid_over = vars(model).get(name)
        # PEFT leaves the model's own there.
        if laid_over is None or getattr(laid_over, "__func__", None) is getattr(type(model), name):
            continue
        raise ValueError(
            f"{getattr(laid_over, '__qualname__', laid_over)} is laid over this {type(model).__name__}'s own {name}, "
            "and need not know of drafts: take it off, or generate without the twin. (A soft prompt of PEFT goes "
            "beside a twin as inputs_embeds, torch.cat([peft_model.get_prompt(1), embeddings], dim=1), or, of prefix "
            "tuning, as past_key_values=peft_model.get_prompt(1), given to generate of peft_model.get_base_model().)"
        )


def check_batch_size(input_ids: torch.LongTensor) -> None:
    """Raises `ValueError` for more than one sequence, long [batch_size, length]."""
    if input_ids.shape[0] > 1:
        raise ValueError(
            f"hf_sirius generates one sequence at a time, got a batch of {input_ids.shape[0]}: call generate for each "
            "prompt (a pipeline does so with batch_size=1)"
        )


def check_lengths(input_ids: torch.LongTensor, model_kwargs: dict, mask_name: str) -> None:
    """Sees to a mask and token types of another length than input_ids, which the stock assisted loop would cut to that
    length.

    Such is the case with inputs_embeds, and where only the new tokens of a turn are passed. Without padding the mask
    says nothing, so it is dropped (as newer versions of `generate` do themselves); with padding this is an error, and
    so it is with token types.

    Args:
        mask_name: of the text's attention mask among `model_kwargs`.
    """
    length = input_ids.shape[1]
    if (token_types := model_kwargs.get("token_type_ids")) is not None and token_types.shape[1] != length:
        raise ValueError(_of_one_length("token_type_ids", token_types, length, "token types"))
    attention_mask = model_kwargs.get(mask_name)
    if attention_mask is None or attention_mask.shape[1] == length:
        return
    if not attention_mask.all():
        raise ValueError(_of_one_length(f"a padded {mask_name}", attention_mask, length, "padding"))
    del model_kwargs[mask_name]


def _of_one_length(what: str, given: torch.Tensor, length: int, leave_out: str) -> str:
    return (
        f"{what} of {given.shape[1]} tokens came with {length} input_ids, while assisted decoding takes them to be of "
        "one length: pass the input_ids of the whole sequence (not inputs_embeds, or of the new tokens alone), or "
        f"leave the {leave_out} out"
    )
