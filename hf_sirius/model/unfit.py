"""Models of which no draft can be verified, and why."""

import inspect

from transformers import PreTrainedModel


_UNFIT = {
    "cpmant": "keeps a prompt of its own in its KV-cache, before the text",
    "prophetnet": "reads one token at a time behind its KV-cache, so that a draft is not verified in one forward",
}


def check_fit(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a model that cannot read several tokens behind a KV-cache."""
    reason = _UNFIT.get(model.config.model_type)
    inputs = inspect.signature(type(model).forward).parameters
    if reason is None and "past_key_values" not in inputs and not getattr(model, "_is_stateful", False):
        reason = "keeps no KV-cache of keys and values, so that each forward reads the whole text anew"
    if reason is not None:
        raise ValueError(f"{type(model).__name__} {reason}: hf_sirius cannot draft for it")
