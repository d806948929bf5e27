"""What is told before torch is imported, and before a model is loaded."""

import importlib.util
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from hf_sirius import SiriusConfig
from hf_sirius.cli import commands, loading
from hf_sirius.cli.main import main


GENERATE = ["generate", "--model", "reasoner", "--prompt", "a"]


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """No model is loaded here."""
    monkeypatch.setattr(commands, "load_model", mock.Mock(side_effect=AssertionError("a model is loaded")))


@pytest.fixture
def without(monkeypatch):
    """Returns a function that hides a package."""
    find_spec = importlib.util.find_spec

    def hide(hidden: str) -> None:
        monkeypatch.setitem(sys.modules, hidden, None)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == hidden else find_spec(name, *rest)
        )
        loading.check_draft_dtype.cache_clear()

    yield hide
    loading.check_draft_dtype.cache_clear()


def told(argv: list[str], capsys) -> str:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-sirius: error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nope", "there is no such directory: give the directory of a saved model, an id on the hub"),
        ("a/b/c", "there is no such directory: give"),
        ("two words", "there is no such directory: give"),
        ("file", "is a file: give the directory"),
        ("empty", "is a directory without a config.json: give the directory"),
        ("resoner", "Did you mean 'reasoner'?"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["eval"], ["tune"], ["bench", "decode"]])
def test_a_model_that_is_not_there_is_told_in_a_line(name, words, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("empty").mkdir()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", mock.Mock(side_effect=ConnectionError))
    error = told([*command, "--model", name], capsys)
    assert f"--model {name}" in error and words in error and "reasoner or smollm2" in error


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (errors.RepositoryNotFoundError, "and nothing of that name on the hub (or it is private: log in"),
        (errors.GatedRepoError, "is gated: ask for access on its page on the hub, and log in"),
        (ConnectionError, "the hub cannot be reached (ConnectionError). Connect to it, or give the directory"),
    ],
)
def test_what_the_hub_says_is_told_in_a_line(raised, words, monkeypatch, capsys):
    given = {"response": mock.Mock(headers={})} if issubclass(raised, errors.HfHubHTTPError) else {}
    error = raised("An essay.\nOf many lines.", **given) if given else raised("An essay.\nOf many lines.")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", mock.Mock(side_effect=error))
    assert words in told(["generate", "--model", "some/model", "--prompt", "a"], capsys)


@pytest.mark.parametrize(
    ("name", "raised", "words"),
    [
        ("./nope", None, "there is no such directory: give the directory of a saved SiriusConfig"),
        (".", None, "is a directory without a sirius_config.json: give"),
        ("some/config", ConnectionError("An essay.\nOf lines."), "the hub cannot be reached (ConnectionError)"),
        (
            "some/config",
            errors.EntryNotFoundError("An essay.\nOf lines."),
            "has no sirius_config.json on the hub",
        ),
    ],
)
def test_a_config_that_is_not_there_is_told_in_a_line(name, raised, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", mock.Mock(side_effect=raised))
    error = told([*GENERATE, "--config", name], capsys)
    assert f"--config {name}" in error and words in error


@pytest.mark.parametrize("cached", [None, "/cache/config.json"])
def test_a_model_of_the_hub_goes_on_and_one_in_the_cache_needs_no_hub(cached, monkeypatch):
    asked = mock.Mock()
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: cached)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked)
    monkeypatch.setattr(commands, "generate", mock.Mock())
    assert main(["generate", "--model", "some/model", "--prompt", "a"]) == 0
    assert asked.called == (cached is None) and commands.generate.called


def test_an_adapter_without_a_config_is_left_to_transformers(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").touch()
    missing = mock.Mock(side_effect=errors.EntryNotFoundError("no config.json"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", missing)
    monkeypatch.setattr(commands, "generate", mock.Mock())
    for name in (str(tmp_path), "some/adapter"):
        assert main(["generate", "--model", name, "--prompt", "a"]) == 0


@pytest.mark.parametrize("command", ["generate", "report"])
@pytest.mark.parametrize(("prompt", "given"), [("", ""), (" \n", ""), ("-", ""), ("-", "\n")])
def test_an_empty_prompt_is_told_in_a_line(command, prompt, given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    assert "the prompt is empty" in told([command, "--model", "reasoner", "--prompt", prompt], capsys)


def test_a_chat_without_a_template_is_told_before_the_model_is_loaded(monkeypatch, capsys):
    tokenizer = SimpleNamespace(chat_template=None)
    monkeypatch.setattr(commands, "load_tokenizer", lambda args: tokenizer)
    assert "has no chat template: leave --chat out" in told([*GENERATE, "--chat"], capsys)


@pytest.mark.parametrize(
    ("package", "argv", "extra"),
    [
        ("bitsandbytes", [*GENERATE, "--quantization", "8bit"], "bnb"),
        ("bitsandbytes", ["tune", "--quantization", "4bit"], "bnb"),
        ("bitsandbytes", [*GENERATE, "--draft_dtype", "nf4"], "bnb"),
        ("bitsandbytes", [*GENERATE, "--config", "saved"], "bnb"),
        ("bitsandbytes", ["report", *GENERATE[1:], "--draft_dtype", "nf4"], "bnb"),
        ("bitsandbytes", ["bench", "decode", "--draft_dtype", "nf4"], "bnb"),
        ("bitsandbytes", ["eval", "--draft_dtype", "nf4"], "bnb"),
        ("matplotlib", ["sweep"], "plot"),
        ("matplotlib", ["sweep", "--plot", "sweep.png"], "plot"),
    ],
)
def test_a_missing_package_is_told_before_a_model_is_loaded(
    package, argv, extra, without, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    SiriusConfig(draft_dtype="nf4").save_pretrained("saved")
    monkeypatch.setattr(commands.benchmark, "bench_decode", None)
    without(package)
    error = told(argv, capsys)
    assert package in error and f"pip install hf_sirius[{extra}]" in error
