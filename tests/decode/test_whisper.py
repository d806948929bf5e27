"""Whisper's own `generate`: segments, suppressed tokens and fallbacks beside a twin are those of the dense model."""

import copy
import gc

import pytest
import torch
from encoder_decoders import tiny_encoder_decoder

from hf_sirius import make_sparse


def whisper():
    """A model that transcribes segments of 40 frames, each of up to 30 tokens, with timestamps from 40 on."""
    model = tiny_encoder_decoder("whisper", eos_token_id=7)
    settings = {
        "eos_token_id": 7, "no_timestamps_token_id": 39, "max_initial_timestamp_index": 5, "is_multilingual": False,
        "begin_suppress_tokens": [8, 9], "suppress_tokens": [10], "max_length": 30,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def audio(num_frames: int) -> torch.Tensor:
    return torch.randn(1, 8, num_frames, generator=torch.Generator().manual_seed(1)).double()


CALLS = {
    "a segment": (40, {}),
    "timestamps": (40, {"return_timestamps": True}),
    "several segments": (110, {"return_timestamps": True}),
    "fallbacks": (110, {"return_timestamps": True, "temperature": (0.0, 0.0), "logprob_threshold": 0.0}),
}


@pytest.mark.parametrize("num_frames, options", CALLS.values(), ids=list(CALLS))
def test_transcribes_what_the_dense_model_does(num_frames, options):
    model = whisper()
    options = {"attention_mask": torch.ones(1, num_frames, dtype=torch.long), **options}
    dense = model.generate(audio(num_frames), **options)
    settings = copy.deepcopy(model.generation_config)
    with make_sparse(model, method="griffin", kernel_size=5, threshold=1.0) as sparse:
        assert torch.equal(model.generate(audio(num_frames), **options, assistant_model=sparse), dense)
        assert sparse.stats.total.num_drafted > 0
    assert model.generation_config.to_dict() == settings.to_dict()
    assert torch.equal(model.generate(audio(num_frames), **options), dense)


def test_a_twin_of_one_call_is_gone_after_it_and_after_an_error():
    model = whisper()
    stock = type(model)

    class Failing(torch.nn.Module):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 12:
                raise RuntimeError("as asked")
            return scores

    gc.disable()
    try:
        model.generate(audio(40), assistant_model=make_sparse(model, method="griffin", threshold=1.0))
        assert type(model) is stock
        with pytest.raises(RuntimeError, match="as asked") as kept:
            model.generate(
                audio(40), assistant_model=make_sparse(model, method="griffin", threshold=1.0),
                logits_processor=[Failing()],
            )  # fmt: skip
        assert kept.value is not None and type(model) is stock
    finally:
        gc.enable()


def test_another_assistant_is_left_to_transformers():
    model, kwargs = whisper(), {"assistant_model": whisper()}
    with make_sparse(model, method="griffin", threshold=1.0) as sparse:
        model._check_decoder_input_ids(kwargs=kwargs)
        assert list(kwargs) == ["assistant_model"]
        kwargs = {"assistant_model": sparse}
        model._check_decoder_input_ids(kwargs=kwargs)
        assert "assistant_model" not in kwargs
