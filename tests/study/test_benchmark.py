"""Benchmarks: a larger model that computes the same, memory that cannot be measured, and what is refused."""

from unittest import mock

import pytest
import torch
from tiny import build_model, make_prompt

from hf_sirius import SiriusConfig
from hf_sirius.study.benchmark import bench_decode, bench_offload
from hf_sirius.study.widening import widen
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
