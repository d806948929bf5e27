"""Benchmarks: a larger model that computes the same, memory that cannot be measured, and what is refused."""

import dataclasses
import json
import runpy
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import build_model, make_prompt
from transformers import BatchEncoding

from hf_sirius import SiriusConfig
from hf_sirius.cli.tables import bench_lines
from hf_sirius.model.projections import is_projection
from hf_sirius.study import benchmark, shapes
from hf_sirius.study.benchmark import bench_decode, bench_offload
from hf_sirius.study.machine import describe_machine, memory_bandwidth
from hf_sirius.study.rivals import Way, counting, int4_copy
from hf_sirius.study.timing import TimedRun, timed_run
from hf_sirius.study.widening import wide_reasoner, widen
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


SIZES = {"hidden_factor": 1, "neuron_factor": 1, "num_problems": 2, "num_repeats": 1, "max_new_tokens": 12}
WAY = {"aal", "acceptance_rate", "bytes_per_token", "bound_seconds_per_token", "decode_seconds_per_token"}


@pytest.fixture
def in_short(monkeypatch):
    """Takes what is to be compiled as it is, and the memory for one of 10 GB a second."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(benchmark, "memory_bandwidth", lambda device: 1e10)


@pytest.mark.slow
@pytest.mark.usefixtures("in_short")
def test_rivals_are_timed_beside_the_twin():
    config = SiriusConfig(method="griffin", threshold=1.0, kernel_size=8)
    figures = bench_decode(config, with_rivals=True, **SIZES)
    names = ["dense, compiled", "int4 copy as assistant", "prompt lookup", "sirius, compiled"]
    assert list(figures["others"]) == names and not figures["left_out"]
    for run in figures["others"].values():
        assert run["num_tokens"] == 12 and run["num_identical"] == 2 and run["ratio_whole"] > 0
    ways = {"dense": figures["dense"], "sirius": figures["sirius"], **figures["others"]}
    for name, way in ways.items():
        assert way.keys() >= WAY
        assert way["bound_seconds_per_token"] == pytest.approx(way["bytes_per_token"] / 1e10)
        assert (way["acceptance_rate"] is None) == name.startswith("dense")
        assert way["aal"] == 1 if name.startswith("dense") else 1 < way["aal"] <= 12
    weights = sum(
        module.weight.nbytes for module in wide_reasoner(1, 1, torch.float32).modules() if is_projection(module)
    )
    assert weights < ways["dense"]["bytes_per_token"] == ways["dense, compiled"]["bytes_per_token"] < 1.2 * weights
    # What is looked up reads nothing of its own.
    assert ways["prompt lookup"]["bytes_per_token"] < ways["dense"]["bytes_per_token"]
    assert ways["sirius, compiled"]["bytes_per_token"] == pytest.approx(ways["sirius"]["bytes_per_token"])
    runs = [run for run in figures["runs"] if run["way"] == "sirius, compiled"]
    assert all(run["num_compiled_steps"] == run["num_steps"] > 0 and run["kernel_sizes"][0] == 8 for run in runs)
    assert len(figures["runs"]) == 2 * len(ways) and figures["overhead"]["bare_forward"] > 0
    lines = bench_lines(figures)
    assert [line.partition(":")[0] for line in lines[1 : 1 + len(ways)]] == list(ways)
    assert "overhead" in lines[-1]


@pytest.mark.usefixtures("in_short")
def test_what_is_not_compiled_here_is_left_out(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler\n\nand how to debug it")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fail)
    config = SiriusConfig(method="cats", threshold=1.0, kernel_size=8, tree_width=2)
    figures = bench_decode(config, with_rivals=True, **SIZES)
    assert figures["left_out"]["dense, compiled"] == "no C++ compiler"
    assert "tree_width is 2" in figures["left_out"]["sirius, compiled"]
    assert list(figures["others"]) == ["int4 copy as assistant", "prompt lookup"]
    assert "Left out: dense, compiled: no C++ compiler" in bench_lines(figures)


@pytest.mark.usefixtures("in_short")
def test_contexts_are_measured_one_by_one_and_larger_models_predicted(monkeypatch):
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 16, "head_dim": 32}
    monkeypatch.setattr(shapes, "SHAPES", {"1b": small})
    monkeypatch.setattr(shapes, "_COMMON", {"vocab_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1})
    config, parts = SiriusConfig(method="griffin", threshold=1.0, kernel_size=8), []
    figures = bench_decode(
        config, contexts=[200, 50], shapes=["1b"], record=lambda so_far: parts.append(json.dumps(so_far)), **SIZES
    )
    assert list(figures["contexts"]) == [50, 200]
    for part in figures["contexts"].values():
        lengths = {run["num_tokens"] for run in part["runs"]}
        assert lengths == {SIZES["max_new_tokens"]}, "past EOS"
    assert [list(json.loads(part).get("contexts", {})) for part in parts] == [["50"], ["50", "200"], ["50", "200"]]
    fewer, more = (figures["contexts"][length]["dense"]["bytes_per_token"] for length in (50, 200))
    assert fewer < more
    (shape,) = figures["predicted"]["shapes"]
    assert shape["is_predicted"] and shape["layers_timed"] == [1, 4] and shape["num_layers"] == 16
    assert [row["way"] for row in shape["rows"]] == ["dense", "sirius, int8", "sirius, int4"]
    dense, *drafts = shape["rows"]
    assert dense["ratio"] == dense["aal"] == 1 and dense["acceptance_rate"] is None
    for row in drafts:
        assert row["kernel_size"] in shapes.KERNEL_SIZES and 0.5 < row["acceptance_rate"] <= 1 < row["aal"]
    # All 16 layers and the head.
    projections = 16 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 96 * 64
    cache = 16 * 2 * 32
    prompt_length = shape["context"]
    assert dense["bytes_per_token"] == pytest.approx(4 * (projections + cache * (prompt_length + 6)))
    told = [line for line in bench_lines(figures) if line.startswith("Predicted, a model of the shape of 1B with the")]
    assert len(told) == 3 and "acceptance of reasoner" in told[0]


def test_figures_are_drawn_from_what_was_written(tmp_path):
    way = {"decode_seconds_per_token": 0.03, "bound_seconds_per_token": 0.02}
    others = {"prompt lookup": way}
    row = {"way": "sirius, int8", "seconds_per_token": 0.3, "bound_seconds_per_token": 0.2, "ratio": 0.5}
    figures = {
        "machine": describe_machine(),
        "model": {"name": "smollm2", "num_parameters": 135e6, "dtype": "torch.float32"},
        "bandwidth": 1e10,
    }
    part = {"dense": way, "sirius": way, "others": others}
    shapes = [{"shape": "1b", "rows": [row]}, {"shape": "8b", "reason": "two layers do not fit"}]
    predicted = {"acceptance_of": "smollm2", "shapes": shapes}
    draw = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "results" / "plot.py"))["draw"]
    without = {**part, "others": {}}  # a way that was left out
    for number, each in enumerate((part, {"contexts": {"64": part, "128": without}, "predicted": predicted})):
        draw({**figures, **each}, file := tmp_path / f"{number}.png")
        assert file.stat().st_size


def test_a_shape_of_which_too_little_fits_is_told(monkeypatch):
    monkeypatch.setattr(shapes.psutil, "virtual_memory", lambda: mock.Mock(available=2**20))
    told = shapes.predict("8b", {}, 1e10, 8, 8, 1, torch.float32)
    assert told["is_predicted"] and "two layers do not fit" in told["reason"] and "rows" not in told


def test_prompts_are_brought_to_a_length_by_the_others():
    prompts = [BatchEncoding({"input_ids": torch.tensor([ids])}) for ids in ([1, 2, 3], [4, 5], [6])]
    made = [prompt["input_ids"][0].tolist() for prompt in benchmark._in_context(prompts, 9)]
    assert made == [[4, 5, 6, 4, 5, 6, 1, 2, 3][-9:], [1, 2, 3, 6, 1, 2, 3, 4, 5][-9:], made[2]]
    assert made[2][-6:] == [1, 2, 3, 4, 5, 6] and len(made[2]) == 9
    assert benchmark._in_context(prompts, None) is prompts
    assert benchmark._in_context(prompts[:1], 7)[0]["input_ids"].tolist() == [[3, 1, 2, 3, 1, 2, 3]]


def test_contexts_that_the_model_does_not_take_are_refused():
    with pytest.raises(ValueError, match=r"contexts=\[1020\] and max_new_tokens=12 are more than the 1024 tokens"):
        bench_decode(SiriusConfig(method="griffin"), contexts=[1020], **SIZES)


def test_stock_drafts_are_counted_by_forwards():
    model = build_model()
    way = Way({"assistant_model": build_model(seed=1)})
    prompt = BatchEncoding({"input_ids": make_prompt(), "attention_mask": torch.ones(1, 11)})
    with counting(model, way) as forwards:
        run = timed_run(model, None, prompt, max_new_tokens=12, **way.options)
    assert sum(forwards.num_read) - forwards.num_drafted(11) == 11 + len(forwards.num_read) - 1
    assert forwards.num_steps >= forwards.num_drafted(11) > 0 and run.num_tokens == 12
    model(make_prompt())
    assert not model._forward_pre_hooks and not way.options["assistant_model"]._forward_pre_hooks


def test_tokens_that_come_with_the_first_one_are_not_behind_it():
    ids = torch.zeros(1, 20, dtype=torch.long)
    run = TimedRun(ids, 10, to_first_token=2.0, decode=8.0, selection=0.0, draft_steps=[], verifications=[], cycles=[])
    assert run.per_token == {"steps": 8 / 9, "decode": 8 / 9, "whole": 1.0}
    assert dataclasses.replace(run, num_first=6).per_token["decode"] == 2.0
    assert set(dataclasses.replace(run, num_first=10).per_token.values()) == {1.0}


def test_a_machine_is_described():
    told = json.loads(json.dumps(describe_machine()))
    assert told["num_threads"] == torch.get_num_threads() and told["device"] and told["date"] > "2026"
    assert memory_bandwidth(torch.device("cpu"), num_bytes=2**16) > 0


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
