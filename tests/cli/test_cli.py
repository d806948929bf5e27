"""The command line, run as a user runs it."""

import json
import subprocess
import sys
import types
from importlib.metadata import entry_points
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sirius import SiriusConfig, calibrate, reasoner_path, reasoner_problems
from hf_sirius.cli import commands, loading, options
from hf_sirius.cli.arguments import CHOSEN_FOR_THE_MODEL, make_parser
from hf_sirius.cli.main import main
from hf_sirius.draft.choice import CHOSEN
from hf_sirius.study import named_models
from hf_sirius.study.problems import final_answer, problem_prompt


PROMPT = problem_prompt(reasoner_problems()[0]["question"])
GENERATE = ["generate", "--model", "reasoner", "--prompt", PROMPT, "--threshold", "1.0"]


def test_generate_prints_the_answer_alone(capsys):
    assert main([*GENERATE, "--method", "griffin"]) == 0
    printed = capsys.readouterr()
    assert final_answer(printed.out) is not None and "Question" not in printed.out


def test_stream_prints_the_same_text(capsys):
    main(GENERATE)
    whole = capsys.readouterr().out
    main([*GENERATE, "--stream"])
    assert capsys.readouterr().out.strip() == whole.strip()


def test_stats_go_to_standard_error(capsys):
    main([*GENERATE, "--stats", "--kernel-size", "5", "--density", "0.25"])
    printed = capsys.readouterr()
    assert " of 5 (AAL, over " in printed.err and "a draft step needs 0." in printed.err and "AAL" not in printed.out


@pytest.mark.parametrize(
    ("command", "is_chosen"),
    [(["generate"], True), (["report"], True), (["bench", "decode"], True), (["bench", "offload"], True),
     (["eval"], False), (["sweep"], False), (["tune"], False)],
)  # fmt: skip
def test_help_tells_what_is_chosen_for_the_model(command, is_chosen, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    options = capsys.readouterr().out.split("\n  --")
    told = [option.split()[0] for option in options if "(default: chosen for the model)" in option]
    assert told == (["method", "density", "draft_dtype", "draft_head"] if is_chosen else [])
    assert set(CHOSEN_FOR_THE_MODEL) <= set(CHOSEN)


def test_a_saved_config_is_used_and_options_win_over_it(tmp_path, capsys):
    SiriusConfig(method="griffin", kernel_size=7, threshold=1.0).save_pretrained(tmp_path)
    main([*GENERATE[:5], "--config", str(tmp_path), "--stats"])
    assert " of 7 (AAL" in capsys.readouterr().err
    main([*GENERATE[:5], "--config", str(tmp_path), "--stats", "--kernel_size", "4"])
    assert " of 4 (AAL" in capsys.readouterr().err


def test_a_method_on_the_command_line_wins_over_a_config_of_another(tmp_path, capsys):
    SiriusConfig(selection="topk", threshold=1.0).save_pretrained(tmp_path)
    assert main([*GENERATE, "--config", str(tmp_path), "--method", "griffin", "--max_new_tokens", "5"]) == 0


def test_chat_template_and_sampling(capsys):
    question = reasoner_problems()[0]["question"]
    options = ["generate", "--model", "reasoner", "--chat", "--do_sample", "--seed", "3", "--prompt", question]
    assert main(options) == 0
    first = capsys.readouterr().out
    assert main(options) == 0
    assert capsys.readouterr().out == first != "\n"


def test_tokens_per_cycle_are_a_number_or_auto(capsys):
    assert main([*GENERATE, "--stats", "--kernel_size", "auto", "--max_new_tokens", "5"]) == 0
    assert "dense steps" in capsys.readouterr().err
    assert main([*GENERATE, "--stats", "--max_new_tokens", "5"]) == 0
    assert "dense steps" in capsys.readouterr().err
    assert main([*GENERATE, "--stats", "--do_sample", "--max_new_tokens", "40"]) == 0  # by its seed the same again
    assert " of 16 (AAL" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*GENERATE, "--kernel_size", "8.5"])
    assert "--kernel-size: must be an int or 'auto', got '8.5'" in capsys.readouterr().err


def test_prompt_from_standard_input(monkeypatch, capsys):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert main([*GENERATE[:3], "--prompt", "-", "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "grifin"], "Did you mean 'griffin'"),
        (["--density", "0"], "density must be in (0, 1]"),
        (["--kernel_size", "1"], "kernel_size must be at least 2"),
        (["--calibration", "nowhere"], "no calibration at"),
        (["--method", "teal", "--budget", "greedy"], "budget='greedy' needs a calibration"),
        (["--compile_draft", "--tree_width", "2", "--method", "griffin"], "compile_draft compiles a step of one token"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--device", "gpu"], "--device gpu cannot be used"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(options, told, capsys):
    assert main([*GENERATE, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-sirius: error: ") and told in error and "Traceback" not in error


def test_a_calibration_and_its_budget_are_options(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(reasoner_path())
    texts = [{"input_ids": [3, 4, 5, 6, 7, 8]}]
    calibrate(model, None, texts, method="teal", budget="greedy", progress=False).save_pretrained(tmp_path)
    given = ["--method", "teal", "--calibration", str(tmp_path), "--budget", "greedy"]
    assert main([*GENERATE, *given]) == 0
    assert main([*GENERATE, *given, "--weighting", "column"]) == 2
    assert "use those, or calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "method"),
    [
        (["--calibration", "somewhere"], "cats"),
        (["--calibration", "somewhere", "--weighting", "column"], "teal"),
        (["--calibration", "somewhere", "--selection", "topk"], "cats"),
        (["--budget", "greedy"], "teal"),
    ],
)
def test_options_that_several_methods_take_choose_one_that_takes_all(given, method):
    args = make_parser().parse_args(["sweep", *given])
    options.choose_method(args)
    assert args.method == method


@pytest.mark.slow
def test_demo_shows_the_table_and_one_coloured_answer(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["demo", "--num_problems", "8"]) == 0
    printed = capsys.readouterr().out
    for expected in ("dense", "griffin 50% alone", "griffin 50% + Sirius", "default + Sirius", "with Sirius:"):
        assert expected in printed


def test_bench_decode_writes_its_figures(tmp_path, capsys):
    options = ["--hidden_factor", "1", "--neuron_factor", "1", "--num_problems", "1", "--num_repeats", "1"]
    file = tmp_path / "decode.json"
    sirius = ["--method", "griffin", "--threshold", "1.0", "--draft_dtype", "bfloat16"]
    assert main(["bench", "decode", *options, *sirius, "--max_new_tokens", "20", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert "1 of 1 answers identical" in capsys.readouterr().out
    assert figures["model"]["name"] == "reasoner" and figures["agreement"] == 1.0
    assert figures["config"]["draft_dtype"] == "bfloat16" and figures["machine"]["torch"] == torch.__version__
    for name in ("dense", "sirius"):
        run = figures[name]
        assert run["num_tokens"] == 20
        decoding = 19 * run["decode_seconds_per_token"]
        assert run["seconds"] == pytest.approx(run["seconds_to_first_token"] + decoding)
        assert decoding == pytest.approx(run["selection_seconds"] + 19 * run["steps_seconds_per_token"])
    for part in ("steps", "decode", "whole"):
        sirius, dense = (figures[name][f"{part}_seconds_per_token"] for name in ("sirius", "dense"))
        assert figures[f"ratio_{part}"] == pytest.approx(sirius / dense)


@pytest.fixture
def as_smollm2(monkeypatch):
    """The reasoner in place of SmolLM2, which is large and comes in other packages."""
    monkeypatch.setitem(named_models._PATHS, "smollm2", reasoner_path)
    prompts = [("How many apples does Ann have?", True), ("def apples():\n", False)]
    monkeypatch.setattr(named_models, "smollm2_prompts", lambda: prompts)
    return prompts


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt", PROMPT, "--max_new_tokens", "4"],
        ["report", "--prompt", PROMPT, "--max_new_tokens", "4"],
        ["eval", "--num_items", "1", "--max_new_tokens", "4"],
        ["sweep", "--num_items", "1", "--max_new_tokens", "4", "--thresholds", "1.0", "--no_plots"],
        ["tune", "--num_prompts", "1", "--max_new_tokens", "4", "--densities", "0.5", "--kernel_sizes", "3"],
        ["bench", "decode", "--num_problems", "2", "--num_repeats", "1", "--max_new_tokens", "4"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_knows_smollm2_by_its_name(command, as_smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--model", "smollm2"]) == 0
    capsys.readouterr()


def test_tune_puts_smollm2s_questions_into_the_chat_template_and_its_code_not(as_smollm2, monkeypatch):
    monkeypatch.setattr(commands, "load_model", mock.Mock())
    monkeypatch.setattr(commands, "tokenize", tokenized := mock.Mock())
    monkeypatch.setattr(commands.tuning, "tune", mock.Mock(side_effect=KeyboardInterrupt))
    assert main(["tune", "--model", "smollm2"]) == 130
    assert [(text, chat) for (text, _, chat), _ in tokenized.call_args_list] == as_smollm2


def test_bench_decode_measures_contexts(tmp_path, capsys):
    options = ["--hidden_factor", "1", "--neuron_factor", "1", "--num_problems", "1", "--num_repeats", "1"]
    options += ["--method", "griffin", "--max_new_tokens", "8", "--contexts", "90", "40"]
    file = tmp_path / "decode.json"
    assert main(["bench", "decode", *options, "--json", str(file)]) == 0
    assert list(json.loads(file.read_text())["contexts"]) == ["40", "90"] and list(tmp_path.iterdir()) == [file]
    printed = capsys.readouterr().out
    assert "40 tokens before: " in printed and "90 tokens before: " in printed and "dense: " in printed


def test_bench_drafts_keeps_what_there_is_when_it_is_stopped(tmp_path, capsys, monkeypatch):
    def stopped(record, **options):  # as Ctrl-C does
        figures = {"model": "reasoner", "dtype": "torch.float32", "kernel_size": 8, "num_prompts": 1, "left_out": []}
        row = {"density": 1.0, "draft_dtype": "int8", "agreement": 0.9, "aal": 7.0, "bytes": 0.5, "ratio": 0.8}
        record({**figures, "rows": [row]})
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "compare_drafts", stopped)
    file = tmp_path / "drafts.json"
    assert main(["bench", "drafts", "--json", str(file)]) == 130
    assert json.loads(file.read_text())["rows"][0]["aal"] == 7.0 and "7.00" in capsys.readouterr().out


def test_bench_decode_takes_a_path_and_answers_the_first_problems(tmp_path, capsys):
    options = ["--num_problems", "2", "--num_repeats", "1", "--max_new_tokens", "5", "--threshold", "1.0"]
    assert main(["bench", "decode", "--model", reasoner_path(), *options]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert "2 of 2 answers identical" in printed.err
    narrow = AutoModelForCausalLM.from_pretrained(reasoner_path()).num_parameters()
    assert figures["model"]["name"] == reasoner_path() and figures["model"]["num_parameters"] == narrow
    assert figures["num_problems"] == figures["num_identical"] == 2 and figures["agreement"] == 1.0


def test_bench_offload_writes_its_figures(tmp_path, capsys):
    options = ["--hidden_factor", "1", "--neuron_factor", "1", "--num_repeats", "1", "--lengths", "8", "20"]
    sirius = ["--threshold", "1.0", "--draft_memory", "7MB"]
    file, folder = tmp_path / "offload.json", tmp_path / "weights"
    command = ["bench", "offload", *options, *sirius, "--folder", str(folder), "--json", str(file)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "8 tokens: 1 of 1 answers identical" in printed
    figures = json.loads(file.read_text())
    assert (figures["config"]["method"], figures["config"]["kernel_size"]) == ("griffin", 32)
    for length, run in figures["lengths"].items():
        assert run["dense"]["num_tokens"] == int(length)
        assert run["dense"]["bytes_streamed_per_token"] == figures["model"]["num_bytes"]
        assert 0 < run["sirius"]["bytes_streamed_per_token"] < figures["model"]["num_bytes"]
        assert run["sirius"]["peak_memory_growth"] >= 0
    assert main(command) == 2
    assert "is not empty: name another one" in capsys.readouterr().err


def test_bench_offload_tells_of_a_full_disk(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=2**20))
    options = ["--hidden_factor", "1", "--neuron_factor", "1", "--method", "griffin"]
    assert main(["bench", "offload", *options, "--folder", str(tmp_path / "weights")]) == 2
    error = capsys.readouterr().err
    assert "has 0.0 GiB free, but the weights take" in error and "another disk" in error


def test_bench_tells_of_a_missing_directory_before_it_runs(tmp_path, capsys):
    assert main(["bench", "decode", "--json", str(tmp_path / "nowhere" / "figures.json")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_installed_script_tells_its_version():
    run = subprocess.run(
        [sys.executable, "-m", "hf_sirius.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("hf_sirius ")


@pytest.mark.parametrize(
    ("command", "method"),
    [
        (["sweep", "--methods", "griffin", "--draft_dtype", "bfloat16"], "griffin"),
        (["sweep", "--selection", "topk"], "cats"),
        (["tune"], "griffin"),
        (["tune", "--config", "cats"], "cats"),
        (["tune", "--config", "cats", "--draft_dtype", "bfloat16"], "cats"),
        (["bench", "decode", "--selection", "topk"], "cats"),
        (["bench", "offload"], "griffin"),
        (["bench", "offload", "--method", "cats"], "cats"),
        (["generate", "--model", "reasoner", "--prompt", "", "--config", "cats", "--method", "griffin"], "griffin"),
    ],
)
def test_the_method_is_the_one_that_options_were_given_for(command, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SiriusConfig(method="cats", selection="topk").save_pretrained("cats")
    args = make_parser().parse_args(command)
    if command[0] != "generate":
        options.choose_method(args)
    config = loading.sirius_config(args)
    assert config.method == method and config.draft_dtype == args.draft_dtype


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["eval", "--task", "nowhere.txt"], "there is no task 'nowhere.txt'"),
        (["eval", "--few_shot", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["eval", "--few_shot", "reasoner"], "there is no file reasoner"),
        (["eval", "--window", "100"], "window means nothing"),
        (["eval", "--output_dir", "file"], "--output_dir file is a file"),
        (["tune", "--model", "smollm2", "--chat"], "leave --chat out"),
        (["tune", "--model", "smollm2", "--widen", "2", "2"], "--widen is for --model reasoner alone"),
        (["bench", "decode", "--model", "smollm2", "--neuron_factor", "2"], "leave neuron_factor out"),
        (["bench", "decode", "--model", reasoner_path(), "--hidden_factor", "2"], "only the reasoner can be widened"),
        (["sweep", "--no_plots", "--densities", "2"], "density must be in (0, 1]"),
        (["sweep", "--no_plots", "--selection", "topk", "--reselect_every", "2"], "options of several methods"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(command, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "load_model", None)
    (tmp_path / "file").touch()
    assert main(command) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["tune", "--max_new_tokens"], ["bench", "decode", "--max_new_tokens"], ["bench", "offload", "--lengths"]],
)
def test_an_output_of_one_token_has_nothing_to_time(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "1"])
    assert "must be a whole number of at least 2, got '1'" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "abc", "1.5", ""])
def test_a_number_that_is_none_is_told_as_such(value, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--num_problems", value])
    assert f"must be a whole number of at least 1, got {value!r}" in capsys.readouterr().err


def test_options_of_several_methods_are_told(capsys):
    assert main(["sweep", "--selection", "topk", "--reselect_every", "2"]) == 2
    assert "options of several methods (griffin, cats) were given" in capsys.readouterr().err


def test_the_installed_script_is_this_command_line():
    (script,) = entry_points(group="console_scripts", name="hf-sirius")
    assert script.load() is main
