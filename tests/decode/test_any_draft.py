"""Whatever a draft is made of, the output is the full model's."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import METHODS, build_model, make_prompt

from hf_sirius import make_sparse


# Sizes that are no multiple of a group, biases, tied heads, transposed and fused projections.
_ODD = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 50}
KINDS = {
    "odd sizes": ("llama", {**_ODD, "vocab_size": 61}),
    "biases": ("llama", {**_ODD, "attention_bias": True, "mlp_bias": True}),
    "tied head": ("llama", {"tie_word_embeddings": True}),
    "Conv1D": ("gpt2", {"hidden_size": 36, "n_inner": 50}),
    "fused": ("phi3", {**_ODD, "vocab_size": 61}),
    "a large vocabulary": ("llama", {"vocab_size": 640, "hidden_size": 128}),
}
DTYPES = (None, "bfloat16", "float16", "int8", "int4", "nf4")


@functools.cache
def model_of(kind: str, dtype: torch.dtype):
    family, fields = KINDS[kind]
    model = build_model(family, dtype=dtype, **fields)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    method=st.sampled_from(list(METHODS)),
    density=st.floats(0.05, 1.0),
    draft_dtype=st.sampled_from(DTYPES),
    draft_head=st.sampled_from(["full", "shortlist"]),
    tree_width=st.sampled_from([1, 3]),
    kernel_size=st.integers(2, 7),
    seed=st.integers(0, 10**6),
)
def test_any_draft_gives_the_dense_output(
    kind, method, density, draft_dtype, draft_head, tree_width, kernel_size, seed
):
    model, prompt, options = model_of(kind, torch.float64), make_prompt(seed=seed), {"max_new_tokens": 14}
    expected = model.generate(prompt, do_sample=False, **options)
    fields = {"density": density, "draft_dtype": draft_dtype, "draft_head": draft_head, "tree_width": tree_width}
    with make_sparse(model, threshold=1.0, kernel_size=kernel_size, **METHODS[method], **fields) as twin:
        assert torch.equal(model.generate(prompt, assistant_model=twin, do_sample=False, **options), expected)
        assert twin.stats.num_drafted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft_dtype", [None, "int8", "int4"])
def test_a_whole_draft_is_seldom_wrong(kind, draft_dtype):
    """So that the outputs above are not the full model's for want of an accepted draft."""
    model, options = model_of(kind, torch.float32), {"max_new_tokens": 40, "do_sample": False}
    with make_sparse(
        model, threshold=1.0, density=1.0, kernel_size=4, draft_dtype=draft_dtype, draft_head="shortlist"
    ) as twin:
        for seed in range(3):
            model.generate(make_prompt(seed=seed), assistant_model=twin, **options)
        assert twin.stats.total.acceptance_rate > (0.1 if draft_dtype == "int4" else 0.6)
