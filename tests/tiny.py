"""Tiny random models, built from configs, and what the tests of generation share."""

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


VOCAB_SIZE = 48
KERNEL_SIZE = 5
METHODS = {
    "cats-threshold": {"method": "cats"},
    "cats-topk": {"method": "cats", "selection": "topk"},
    "griffin": {"method": "griffin"},
    "teal": {"method": "teal"},
    "teal-column": {"method": "teal", "weighting": "column"},
}
_LLAMA_LIKE = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_GEMMA = {**_LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
_FAMILIES = {
    "llama": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "gpt2": {"n_layer": 2, "n_head": 4, "n_inner": 64},
    "opt": {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "mistral": {**_LLAMA_LIKE, "sliding_window": 8},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "num_hidden_layers": 3, "sliding_window_pattern": 3},
}
SLIDING = ("mistral", "gemma2", "gemma3_text")
EAGER = ("gemma2",)  # soft-capped attention, for which transformers has no sdpa


def build_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **fields):
    """Returns a random model that writes varied tokens and, unless a generation sets one, knows no EOS."""
    no_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(family, **{**sizes, **no_ids, **_FAMILIES[family], **fields})
    torch.manual_seed(seed)
    attention = "eager" if family in EAGER else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    for name, value in no_ids.items():
        setattr(model.generation_config, name, value)
    return model.eval()


@functools.cache
def shared_model(family: str = "llama", seed: int = 0):
    """Returns a model that tests share; they leave it as it was."""
    return build_model(family, seed)


def slow(*values) -> list:
    """Returns values as parameters of a test that `pytest -m slow` alone runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow_unless(is_often: bool) -> list:
    """Returns the marks of a parameter that `pytest -m slow` alone runs unless it is one for every run."""
    return [] if is_often else [pytest.mark.slow]


def make_prompt(length: int = 11, seed: int = 0) -> torch.Tensor:
    """Returns random token ids, long [1, length], without the id 0, with which tests pad."""
    return torch.randint(1, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(seed))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a word-level tokenizer in which token i is the word `w{i}`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, VOCAB_SIZE - 2)}}
    words |= {"<unk>": VOCAB_SIZE - 2, "abcdef": VOCAB_SIZE - 1}  # the latter is what StopStringCriteria probes with
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def sparse_logits(twin, prompt, tokens):
    """Returns the logits of a draft over `tokens` with the neurons that `prompt` chose."""
    with torch.no_grad(), twin.new_call() as call:
        with call.draft.observing(None):
            twin.dense_model(prompt)
        call.draft.select()
        with call.draft.drafting():
            return twin(tokens).logits
