"""Tuning: the parts of a call, the choice, the refusals and the command end to end. No test looks at
how fast anything is.
"""

import dataclasses
import itertools
import json
from unittest import mock

import pytest
import torch
from families import tiny_model
from tiny import build_model, make_prompt, shared_model

from hf_sirius import SiriusConfig, make_sparse, reasoner_path
from hf_sirius.cli.main import main
from hf_sirius.study import timing, tuning
from hf_sirius.study.prediction import Costs, expected_events, match_rates
from hf_sirius.study.timing import agreement_of
from hf_sirius.study.tuning import tune
from hf_sirius.study.tuning_result import Candidate, Measurement, Tuning


NUM_NEW = 12
SHORT = {"max_new_tokens": NUM_NEW, "num_repeats": 1, "kernel_sizes": (3, 6)}


def prompts(number: int = 2) -> list[dict]:
    return [{"input_ids": make_prompt(seed=seed)} for seed in range(number)]


# The parts of a call


@pytest.mark.parametrize("method", ["griffin", "cats"])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_events_of_a_real_call_are_predicted_from_it(method, kernel_size):
    """In float64 a draft's tokens hardly depend on where its cycle began, and the same kernel size asks no more."""
    model = shared_model()
    with make_sparse(model, method=method, threshold=1.0, kernel_size=kernel_size) as twin:
        run = timing.timed_run(model, twin, prompts()[0], max_new_tokens=20)
    known = match_rates(run.cycles)
    num_steps, verifications = expected_events(known, kernel_size, 19)
    assert run.num_decoded == len(known) == 19
    assert len(run.draft_steps) == sum(len(cycle.drafted_ids) for cycle in run.cycles)
    assert len(run.verifications) == len(run.cycles)
    if {0.0, 1.0}.issuperset(known):  # nothing was unknown
        assert num_steps == len(run.draft_steps) and sum(verifications.values()) == len(run.cycles)
    assert not model._forward_pre_hooks and not twin._forward_pre_hooks


def test_a_model_that_returns_dicts_is_timed():
    model = build_model()
    model.generation_config.return_dict_in_generate = True
    assert timing.timed_run(model, None, prompts()[0], max_new_tokens=5).num_tokens == 5


def test_parts_add_up_to_the_whole():
    model, moments = shared_model(), itertools.count()
    with (
        make_sparse(model, method="griffin", threshold=1.0, kernel_size=4) as twin,
        mock.patch.object(timing.time, "perf_counter", lambda: float(next(moments))),
    ):
        run = timing.timed_run(model, twin, prompts()[0], max_new_tokens=20)
    parts = [run.to_first_token, run.selection, *run.draft_steps, *run.verifications]
    whole = next(moments) - 1  # from the first question for the time to the last
    assert run.seconds == whole and 0 < sum(parts) < whole and min(parts) > 0


def test_times_are_those_at_the_usual_pace(monkeypatch):
    """While everything takes longer, a dense step does so as well."""
    paces = iter([1.0, 3.0, 1.0, 1.0])
    monkeypatch.setattr(tuning, "_pace", lambda *args: next(paces))
    run = timing.TimedRun(make_prompt(), 2, 2.0, 20.0, 4.0, [6.0], [8.0], [])
    runner = mock.Mock(return_value=run)
    monkeypatch.setattr(tuning, "timed_run", runner)
    grid = [[SiriusConfig(method="griffin", threshold=1.0, kernel_size=n) for n in (3, 6)]]
    dense, runs, sized, _ = tuning._run_all(shared_model(), prompts(1), grid, 8, mock.Mock())
    half = timing.TimedRun(run.output_ids, 2, 1.0, 10.0, 2.0, [3.0], [4.0], [])
    assert (dense, list(runs.values()), sized) == ([half], [[half]], [run])
    # Two full cycles with the smaller kernel size, which no EOS cuts short.
    lengths = [call.kwargs for call in runner.call_args_list[2:]]  # behind the first use of each model
    assert lengths == [{"max_new_tokens": 8}] * 2 + [{"max_new_tokens": 7, "min_new_tokens": 7}]


# The choice


def measurement(*decode: float, whole: float | None = None) -> Measurement:
    return Measurement(decode, decode if whole is None else (whole,) * len(decode), 1.0)


def tuning_of(measured: Measurement) -> Tuning:
    config = SiriusConfig(method="griffin", kernel_size=16, threshold=1.0)
    costs = Costs(2.0, {16: 10.0}, {("griffin", 0.5, None): 1.8}, {("griffin", 0.5, None): 7.0})
    best = Candidate(config, 3.14, 1.2, 1.1, measured=measured)
    return Tuning(best, (best,), costs, {}, {})


def test_a_verdict_says_plainly_that_sirius_does_not_help_and_why():
    result = tuning_of(measurement(1.2, 1.23, 1.3))
    assert not result.helps and result.measured_ratio == 1.23 and result.predicted_ratio == 1.2
    assert result.verdict.startswith("Sirius does not help on this machine: the best setting (griffin 0.5, kernel")
    for part in ("takes 1.23 of the dense time", "A draft step costs 0.90 of a dense step", "3.1 tokens"):
        assert part in result.verdict
    assert "a verification of 16 tokens 5.00 dense steps" in result.verdict and "noise" not in result.verdict


@pytest.mark.parametrize(
    ("measured", "helps", "is_noise"),
    [
        (measurement(0.5, 0.6, 0.7, 1.2), True, False),
        (measurement(0.5, 0.6, 1.1, 1.2), False, True),
        (measurement(0.5, 0.6, 0.7, 1.1, 1.2), False, True),
        (measurement(0.9, 0.95, 0.9, 1.0), True, False),
        (measurement(0.5, 0.6, 0.7, whole=1.05), False, False),
    ],
)
def test_what_is_within_noise_does_not_help(measured, helps, is_noise):
    result = tuning_of(measured)
    assert result.helps is helps and ("within noise" in result.verdict) is is_noise
    assert result.verdict.startswith("Sirius helps") is helps


def test_tune_picks_from_the_candidates():
    model = shared_model()
    methods = ("griffin", "cats")
    result = tune(
        model, prompts(), methods=methods, densities=(0.5, 0.25), num_measured=3, draft_dtypes=[None], **SHORT
    )
    settings = {(c.config.method, c.config.density, c.config.kernel_size) for c in result.candidates}
    assert settings == set(itertools.product(methods, (0.5, 0.25), (3, 6)))
    assert all(c.config.threshold == 1.0 and c.agreement == 1.0 for c in result.candidates)
    predicted = [c.predicted_decode for c in result.candidates]
    assert predicted == sorted(predicted)
    assert [c.measured is not None for c in result.candidates] == [True] * 3 + [False] * 5
    assert result.measured_ratio == min(c.measured.ratio_decode for c in result.candidates[:3])
    assert result.config == result.best.config and len(result.best.measured.decode) == 2
    assert set(result.costs.draft_steps) == set(itertools.product(methods, (0.5, 0.25), (None,)))
    assert {3, 6} <= set(result.costs.verifications) and not result.left_out
    assert json.loads(json.dumps(result.as_dict()))["config"] == result.config.to_dict()
    assert "_get_candidate_generator" not in model.__dict__  # every twin is detached


def test_the_best_measured_candidate_is_chosen_whatever_was_predicted(monkeypatch):
    measurements = iter([measurement(0.9), measurement(0.7), measurement(0.8)])
    monkeypatch.setattr(tuning, "_measure", lambda *args: next(measurements))
    result = tune(shared_model(), prompts(1), num_measured=3, **SHORT)
    assert result.best is result.candidates[1] and result.measured_ratio == 0.7 and result.helps


def test_predictions_come_from_costs_and_matches(monkeypatch):
    """With costs that say so, the setting whose drafts are free and all accepted is predicted as it must be."""
    costs = Costs(1.0, {3: 2.0, 6: 2.0}, {("griffin", 1.0, None): 0.25}, {("griffin", 1.0, None): 3.0})
    monkeypatch.setattr(tuning, "_costs", lambda *args: costs)
    monkeypatch.setattr(tuning, "_measure", lambda *args: measurement(1.0))
    result = tune(shared_model(), prompts(1), methods=["griffin"], densities=[1.0], draft_dtypes=[None], **SHORT)
    # Of 12 tokens 11 are decoded: 6 + 5 with kernel_size 6, 3 + 3 + 3 + 2 with 3 (whose last verification is shorter).
    last = costs.verification(5), costs.verification(2)
    expected = {6: (3.0 + 9 * 0.25 + 2.0 + last[0]) / 11, 3: (3.0 + 7 * 0.25 + 3 * 2.0 + last[1]) / 11}
    assert {c.config.kernel_size: c.predicted_decode for c in result.candidates} == pytest.approx(expected)
    assert {c.config.kernel_size: c.advance_length for c in result.candidates} == pytest.approx({6: 5.5, 3: 2.75})


def test_fields_of_the_config_go_to_the_methods_that_know_them():
    config = SiriusConfig(method="cats", selection="topk", draft_dtype="bfloat16", temperature=0.5)
    model = build_model(dtype=torch.float32)
    result = tune(model, prompts(1), config, methods=["griffin", "cats"], densities=[0.5], **SHORT)
    found = {(c.config.method, c.config.draft_dtype, c.config.selection) for c in result.candidates}
    assert found == {("griffin", "bfloat16", "threshold"), ("cats", "bfloat16", "topk")}
    assert {c.config.temperature for c in result.candidates} == {0.5}


@pytest.mark.slow
def test_an_agreement_is_kept_by_all_candidates():
    model = shared_model()
    options = {**SHORT, "thresholds": (0.0, 0.3), "methods": ["griffin"], "densities": [0.25], "num_measured": 9}
    strict = tune(model, prompts(), agreement=0.95, **options)
    assert all(c.agreement >= 0.95 for c in strict.candidates)
    assert "only 0." in strict.left_out["griffin 0.25, threshold 0.0"]  # which keeps every token of the draft
    assert strict.best.measured.agreement >= 0.95
    loose = tune(model, prompts(), agreement=0.01, **options)
    thresholds = {c.config.threshold: c.agreement for c in loose.candidates}
    assert set(thresholds) == {0.0, 0.3, 1.0} and thresholds[0.0] < 0.95 and thresholds[1.0] == 1.0
    # Fewer rejections are fewer verifications.
    lengths = {c.config.threshold: c.advance_length for c in loose.candidates if c.config.kernel_size == 6}
    assert lengths[0.0] == pytest.approx(5.5) and lengths[1.0] < 4


def test_a_candidate_whose_measured_outputs_agree_too_little_is_passed_over(monkeypatch):
    measurements = iter([dataclasses.replace(measurement(0.1), agreement=0.5), measurement(0.9)])
    monkeypatch.setattr(tuning, "_measure", lambda *args: next(measurements))
    result = tune(shared_model(), prompts(1), agreement=0.6, methods=["cats"], densities=[0.5], **SHORT)
    assert result.best is result.candidates[0] and result.measured_ratio == 0.9
    assert all((c.measured or c).agreement >= 0.6 for c in result.candidates)
    assert list(result.left_out.values()) == ["only 0.500 of the measured outputs' tokens agree"]


@pytest.mark.parametrize("tree_width", [1, 3])
def test_agreement_is_with_what_the_call_would_have_chosen(tree_width):
    """The argmax of the processed logits, each behind the output before it."""
    model = build_model()
    model.generation_config.repetition_penalty = 1.3
    runs, num_agreed, num_tokens = [], 0, 0
    with make_sparse(model, method="griffin", density=0.2, threshold=0.02, tree_width=tree_width) as twin:
        for inputs in prompts(3):
            runs.append(timing.timed_run(model, twin, inputs, max_new_tokens=16))
    for run in runs:
        for end in range(len(run.output_ids[0]) - run.num_tokens, len(run.output_ids[0])):
            chosen = model.generate(run.output_ids[:, :end], max_new_tokens=1, do_sample=False)[0, -1]
            num_agreed += (chosen == run.output_ids[0, end]).item()
            num_tokens += 1
    assert num_agreed < num_tokens == 48
    assert agreement_of(runs) == pytest.approx(num_agreed / num_tokens)


def test_prompts_that_end_at_once_are_passed_over():
    model = build_model()
    first = [model.generate(**p, max_new_tokens=1, do_sample=False)[0, -1].item() for p in prompts()]
    assert first[0] != first[1]
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = first[0]
    result = tune(model, prompts(), methods=["cats"], **SHORT)
    assert len(result.best.measured.decode) == 1
    with pytest.raises(ValueError, match="every output ends with its first token"):
        tune(model, prompts(1), methods=["cats"], **SHORT)


def test_without_settings_formats_are_candidates():
    result = tune(build_model(dtype=torch.float32), prompts(1), **SHORT)
    found = {(c.config.density, c.config.draft_dtype) for c in result.candidates}
    assert found == {(1.0, "int8"), (1.0, "int4"), (0.5, None), (0.5, "int8"), (0.5, "int4")}
    assert {c.config.method for c in result.candidates} == {"griffin"}


def test_what_make_sparse_refuses_is_left_out_with_the_reason():
    model = tiny_model("bitnet")
    both = {"methods": ["griffin", "cats"], "densities": [0.5], "draft_dtypes": [None]}
    result = tune(model, prompts(1), **both, **SHORT)
    assert {c.config.method for c in result.candidates} == {"cats"}
    assert "cannot be gathered" in result.left_out["griffin 0.5, threshold 1.0"]
    with pytest.raises(ValueError, match=r"no candidate works with this BitNetForCausalLM: .* cannot be gathered"):
        tune(model, prompts(1), methods=["griffin"], densities=[0.5], **SHORT)


def test_offloaded_models_take_griffin(tmp_path):
    from accelerate import disk_offload

    model = build_model(dtype=torch.float32)
    disk_offload(model, str(tmp_path))
    both = {"methods": ["griffin", "cats"], "densities": [0.5], "draft_dtypes": [None]}
    result = tune(model, prompts(1), **both, **SHORT)
    assert {c.config.method for c in result.candidates} == {"griffin"}
    assert "offloaded by accelerate" in result.left_out["cats 0.5, threshold 1.0"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"methods": ["grifin"]}, "Did you mean 'griffin'"),
        ({"methods": []}, "must each name one candidate"),
        ({"kernel_sizes": []}, "must each name one candidate"),
        ({"draft_dtypes": []}, "kernel_sizes and draft_dtypes must each name one candidate"),
        ({"kernel_sizes": [1]}, "kernel_size must be at least 2"),
        ({"densities": [0.5, 1.5]}, "density must be in"),
        ({"agreement": 1.0}, r"agreement must be in \(0, 1\), a share of the tokens, got 1.0"),
        ({"agreement": 0}, "agreement must be in"),
        ({"thresholds": [0.5]}, "pass an agreement"),
        ({"agreement": 0.9, "thresholds": [2.0]}, "threshold must be in"),
        ({"max_new_tokens": 1}, "max_new_tokens must be at least 2, got 1"),
        ({"num_measured": 0}, "num_measured must be at least 1"),
        ({"num_repeats": 0}, "num_repeats must be at least 1"),
        ({"config": SiriusConfig(tree_width=2)}, "leave tree_width out"),
        ({"config": SiriusConfig(draft_confidence=0.5)}, "leave draft_confidence out"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [{"input_ids": torch.ones(2, 3, dtype=torch.long)}]}, r"one sequence, .* got \[2, 3\]"),
        ({"prompts": [{"input_ids": torch.ones(1, 0, dtype=torch.long)}]}, "one sequence"),
        ({"prompts": [{"input_ids": make_prompt(3), "attention_mask": torch.tensor([[0, 1, 1]])}]}, "padded"),
    ],
)
def test_refusals_come_before_anything_runs(options, told, monkeypatch):
    monkeypatch.setattr(tuning, "_run_all", None)
    with pytest.raises(ValueError, match=told):
        tune(shared_model(), **{"prompts": prompts(1), **options})


def test_prompts_that_are_not_tokenized_are_refused():
    with pytest.raises(TypeError, match=r"what tokenizer.* returns, with input_ids, got str"):
        tune(shared_model(), ["a text"])


# The command

COMMAND = ["tune", "--max_new_tokens", "9", "--num_prompts", "1", "--kernel_sizes", "3", "5", "--num_repeats", "1"]


def test_command_writes_a_config_and_figures_and_says_that_a_small_model_gains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lost = measurement(1.4, 1.5, 1.6)  # the machine's own speed is no matter of tests
    monkeypatch.setattr(tuning, "_measure", lambda *args: lost)
    output, file = tmp_path / "tuned", tmp_path / "tuned.json"
    options = [
        "--methods",
        "griffin",
        "cats",
        "--densities",
        "0.5",
        "--draft_dtype",
        "bfloat16",
        "--output",
        str(output),
        "--json",
        str(file),
    ]
    assert main([*COMMAND, *options]) == 0
    printed = capsys.readouterr().out
    assert "Sirius does not help on this machine: the best setting" in printed.replace("\n", " ")
    assert "1.500" in printed and "…" not in printed
    config, figures = SiriusConfig.from_pretrained(output), json.loads(file.read_text())
    assert config.to_dict() == figures["config"] and config.threshold == 1.0 and config.kernel_size in (3, 5)
    assert figures["helps"] is False and figures["measured_ratio"] == 1.5 and len(figures["candidates"]) == 4
    dtypes = {c["config"]["method"]: c["config"]["draft_dtype"] for c in figures["candidates"]}
    assert dtypes == {"griffin": "bfloat16", "cats": "bfloat16"} and figures["machine"]["torch"] == torch.__version__


def test_command_measures_a_prompt_file_with_an_agreement(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "prompts.txt"
    file.write_text("Question: Ann has 17 apples .\nAnswer:\n")
    options = ["--methods", "cats", "--densities", "0.3", "--agreement", "0.5", "--thresholds", "0.1"]
    options += ["--draft_dtypes", "none", "int8"]
    assert main([*COMMAND, "--prompts", str(file), *options, "--widen", "2", "1"]) == 0
    printed = capsys.readouterr().out
    assert "cats 0.3, threshold 0.1" in printed and "agree-" in printed and "…" not in printed
    assert "on this machine" in printed.replace("\n", " ")


def test_command_shows_reasons_as_they_are(capsys, monkeypatch):
    """Brackets in them are no markup."""
    monkeypatch.setenv("COLUMNS", "200")

    def without_bitsandbytes(model, config):
        if config.method == "griffin":
            raise ImportError("needs bitsandbytes: pip install hf_sirius[bnb]")
        return make_sparse(model, config)

    monkeypatch.setattr(tuning, "make_sparse", without_bitsandbytes)
    options = ["--methods", "griffin", "cats", "--densities", "0.5", "--kernel_sizes", "4"]
    assert main([*COMMAND, *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "needs bitsandbytes: pip install hf_sirius[bnb]" in printed and "cats 0.5" in printed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--output", "nowhere/tuned"], "does not exist: make it first"),
        (["--json", "nowhere/tuned.json"], "does not exist: make it first"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--model", reasoner_path()], "needs --prompts, a file; only reasoner and smollm2"),
        (["--model", reasoner_path(), "--widen", "2", "2"], "--widen is for --model reasoner alone"),
        (["--quantization", "8bit", "--widen", "2", "2"], "leave --quantization or --widen out"),
        (["--draft_dtype", "int3"], "draft_dtype must be"),
        (["--agreement", "2"], "agreement must be in (0, 1)"),
        (["--thresholds", "0.5"], "pass an agreement"),
        (["--densities", "1.5"], "density must be in (0, 1]"),
    ],
)
def test_command_tells_what_is_wrong_before_it_loads_a_model(options, told, capsys, monkeypatch):
    monkeypatch.setattr("hf_sirius.cli.commands.load_model", None)
    assert main([*COMMAND, *options]) == 2
    assert told in capsys.readouterr().err
