"""Benchmarks: a larger model that computes the same, memory that cannot be measured, and what is refused."""

from unittest import mock

import pytest
import torch
from tiny import build_model, make_prompt

from hf_sirius import SiriusConfig
from hf_sirius.cli.tables import bench_lines
from hf_sirius.study.benchmark import bench_decode, bench_offload
from hf_sirius.study.rivals import int4_copy
from hf_sirius.study.widening import widen
from hf_sirius.weights.linear import DraftLinear
from hf_sirius.weights.memory import PeakMemory


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("factors", [(1, 1), (2, 3), (3, 1)])
def test_widening_changes_no_logit(factors, tied):
    model = build_model(tie_word_embeddings=tied)
    wide = widen(model, *factors)
    # RMSNorm works in float32.
    torch.testing.assert_close(wide(make_prompt()).logits, model(make_prompt()).logits, rtol=0, atol=1e-4)
    assert wide.config.hidden_size == factors[0] * model.config.hidden_size
    assert wide.config.intermediate_size == factors[1] * model.config.intermediate_size
    assert not any(parameter.is_meta for parameter in wide.parameters())


def test_factors_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0 and 2"):
        widen(build_model(), 0, 2)


@pytest.mark.parametrize("factor", ["hidden_factor", "neuron_factor"])
def test_only_the_reasoner_is_widened(factor, monkeypatch):
    monkeypatch.setattr("hf_sirius.study.benchmark.AutoModelForCausalLM", None)
    with pytest.raises(ValueError, match=f"only the reasoner can be widened, .* smollm2: leave {factor} out"):
        bench_decode(SiriusConfig(method="griffin"), "smollm2", **{factor: 1})


def test_rivals_are_timed_beside_the_twin():
    sizes = {"hidden_factor": 1, "neuron_factor": 1, "num_problems": 2, "num_repeats": 1, "max_new_tokens": 12}
    figures = bench_decode(SiriusConfig(method="griffin", threshold=1.0, kernel_size=16), with_rivals=True, **sizes)
    assert figures["others"].keys() == {"int4 copy as assistant", "prompt lookup"}
    for run in figures["others"].values():
        assert run["num_tokens"] == 12 and run["num_identical"] == 2 and run["ratio_whole"] > 0
    assert [line.partition(":")[0] for line in bench_lines(figures)[1:]] == list(figures["others"])


@pytest.mark.parametrize("tied", [False, True])
def test_the_rival_of_4_bits_shares_nothing_with_the_model(tied):
    model = build_model(tie_word_embeddings=tied, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assistant = int4_copy(model)
    names = {name: type(module) for name, module in model.named_modules()}
    assert {names[name] for name, m in assistant.named_modules() if isinstance(m, DraftLinear)} == {torch.nn.Linear}
    assert len([m for m in assistant.modules() if isinstance(m, DraftLinear)]) == 7 * 2 + 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = model.generate(make_prompt(), max_new_tokens=12, do_sample=False)
    options = {"assistant_model": assistant, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(make_prompt(), **options), expected)


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_memory_is_not_known_where_its_peak_cannot_be_reset(error, monkeypatch):
    monkeypatch.setattr("builtins.open", mock.Mock(side_effect=error))
    memory = PeakMemory(torch.device("cpu"))
    assert not memory.is_known and memory.growth() is None
    assert not PeakMemory(torch.device("meta")).is_known


def test_outputs_of_one_token_are_refused(monkeypatch):
    monkeypatch.setattr("hf_sirius.study.benchmark.wide_reasoner", None)
    for bench, options in ((bench_decode, {"max_new_tokens": 1}), (bench_offload, {"lengths": (8, 1)})):
        with pytest.raises(ValueError, match="at least 2 tokens"):
            bench(SiriusConfig(method="griffin"), **options)


def test_a_folder_is_checked_before_a_model_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sirius.study.benchmark.wide_reasoner", None)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        bench_offload(SiriusConfig(method="griffin"), tmp_path)
