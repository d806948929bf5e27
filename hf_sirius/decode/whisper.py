"""Whisper's own `generate`, which cuts audio into segments and makes a call of stock `generate` for each.

Told of an assistant it transcribes one segment alone, lets tokens begin a text that it suppresses otherwise, and leaves
a mark in the assistant's settings, which are the model's. So a twin goes by another name until a segment is decoded.
"""

from collections.abc import Callable
from typing import Any


_HIDDEN = "sirius_twin"  # among the keyword arguments of `generate`


class Segmented:
    """What a Whisper model does otherwise while twins of it live. `is_bound(user, model)` tells whether one is a twin.

    The methods that are laid over are private to transformers; tests/decode/test_whisper.py fails if they change.
    """

    is_bound: Callable[[Any, Any], bool]

    def _check_decoder_input_ids(self, kwargs: dict) -> None:
        super()._check_decoder_input_ids(kwargs=kwargs)
        if self.is_bound(kwargs.get("assistant_model"), self):
            kwargs[_HIDDEN] = kwargs.pop("assistant_model")

    def generate_with_fallback(self, *args: Any, kwargs: dict, **others: Any) -> Any:
        if _HIDDEN in kwargs:
            kwargs = {**kwargs, "assistant_model": kwargs[_HIDDEN]}
            del kwargs[_HIDDEN]
        return super().generate_with_fallback(*args, kwargs=kwargs, **others)
