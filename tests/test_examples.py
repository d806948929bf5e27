"""Every example runs, in a process of its own, as its docstring says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]


def run(*command: str, given: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *command], input=given, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate():
    printed = run("examples/generate.py")
    assert printed.count("####") >= 2 and "drafted ones were kept" in printed


def test_pipeline():
    assert run("examples/pipeline.py").count("####") == 3


@pytest.mark.slow
def test_streaming_chat_over_two_turns():
    problem = "Ann has {} apples. She buys 8 more. She sells 5 of them. How many apples does Ann have now?\n"
    printed = run("examples/streaming_chat.py", given=problem.format(17) + problem.format(30) + "\n")
    assert "#### 20" in printed and "#### 33" in printed


@pytest.mark.slow
def test_streaming_chat_ends_quietly_at_the_end_of_its_input():
    done = subprocess.run(
        [sys.executable, "examples/streaming_chat.py"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and done.stdout == "you: \n" and "Traceback" not in done.stderr


def test_streaming_chat_forgets_an_answer_that_is_interrupted(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import streaming_chat

    class Interrupted(streaming_chat.TextStreamer):
        num_texts = 0

        def on_finalized_text(self, text, stream_end=False):
            Interrupted.num_texts += 1
            if Interrupted.num_texts == 2:
                raise KeyboardInterrupt
            super().on_finalized_text(text, stream_end)

    problem = "Ann has {} apples. She buys 8 more. She sells 5 of them. How many apples does Ann have now?"
    lines = iter([problem.format(17), problem.format(30), KeyboardInterrupt])

    def input_(prompt):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", input_)
    monkeypatch.setattr(streaming_chat, "TextStreamer", Interrupted)
    monkeypatch.setattr(sys, "argv", ["streaming_chat.py"])
    streaming_chat.main()
    printed = capsys.readouterr().out
    assert "#### 20" not in printed and "#### 33" in printed
    assert "Ann" not in printed  # the prompt of the next answer is skipped as ever


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--method", "teal", "--budget", "greedy", "--density", "0.5")])
def test_calibration(tmp_path, options):
    printed = run("examples/calibration.py", "--output_dir", str(tmp_path), "--max_tokens", "2000", *options)
    assert "####" in printed and (tmp_path / "sirius_config.json").is_file()


def test_reasoner_problems():
    printed = run("examples/reasoner/problems.py", "--num_problems", "3", "--min_steps", "2", "--max_steps", "2")
    assert printed.count('"num_steps": 2') == 3


@pytest.mark.slow
def test_offload():
    options = ("--hidden_factor", "1", "--neuron_factor", "2", "--max_new_tokens", "24")
    printed = run("examples/offload.py", *options, "--draft_dtype", "nf4", "--draft_memory", "8MiB")
    assert "the same output: True" in printed and printed.count("tokens/s, peak memory") == 2


@pytest.mark.slow
def test_offload_by_a_device_map():
    model = ("--model", str(ROOT / "hf_sirius" / "reasoner" / "model"), "--max_new_tokens", "20")
    printed = run("examples/offload.py", *model, "--resident", "4MiB", "--cpu_memory", "4MiB")
    assert "the same output: True" in printed
    with pytest.raises(AssertionError, match="the whole model fits into --resident 1GiB"):
        run("examples/offload.py", *model, "--cpu_memory", "1GiB")


@pytest.mark.slow
def test_tree_memory():
    sizes = ("--context_length", "300", "--max_new_tokens", "40", "--density", "0.1")
    printed = run("examples/tree_memory.py", *sizes, "--tree_widths", "1", "4")
    states = float(re.search(r"The states of 300 tokens take (.*) MiB; a cycle grows by:", printed)[1])
    line = r"width \d+: (.*) MiB \(median; at most (.*)\), (\d+) nodes drafted, (\d+) verified"
    found = re.findall(line, printed)
    (one, _, _, one_verified), (four, most, drafted, verified) = (map(float, width) for width in found)
    # A copy of the states for each continuation would show.
    assert 0 < one < four <= most and four < states
    assert one_verified < verified < drafted
    for option, value, told in (
        ("--tree_widths", "17", "tree_width must be in 1 to 16 .*, got 17"),
        ("--context_length", str(10**7), "ask for a context_length of at most that"),
        ("--max_new_tokens", "33", "too short for two cycles"),
    ):
        with pytest.raises(AssertionError, match=told):
            run("examples/tree_memory.py", option, value)


def test_live_bytes_are_those_of_tensors_that_are_alive(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from tree_memory import LiveBytes

    with LiveBytes() as live:
        kept = torch.zeros(1000, dtype=torch.uint8)
        live.restart()
        for _ in range(3):
            torch.ones(5000, dtype=torch.uint8)  # gone at once
        kept.view(10, 100).add_(1)  # no memory of its own
        assert live.restart() == 5000 and live.num_bytes == 1000


@pytest.mark.slow
def test_reasoner_training_goes_on_from_its_checkpoint(tmp_path):
    options = ("--output_dir", str(tmp_path), "--batch_size", "4", "--save_every", "2", "--num_eval_problems", "2")
    run("examples/reasoner/train.py", *options, "--num_steps", "2")
    run("examples/reasoner/train.py", *options, "--num_steps", "4")
    run("examples/reasoner/export.py", str(tmp_path), "--output_dir", str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert "4 steps" in (tmp_path / "exported" / "README.md").read_text().replace("\n ", "")
    longer = ("--output_dir", str(tmp_path / "longer"), "--init_from", str(tmp_path / "exported"), "--batch_size", "4")
    run("examples/reasoner/train.py", *longer, "--num_steps", "1", "--max_equations", "12", "--num_eval_problems", "2")
    assert (tmp_path / "longer" / "checkpoint.pt").is_file()


@pytest.mark.slow
def test_training_of_a_mixture_goes_on_from_its_checkpoint(tmp_path):
    options = ("--output_dir", str(tmp_path), "--batch_size", "2", "--save_every", "1", "--num_eval_problems", "1")
    run("examples/reasoner/train_moe.py", *options, "--num_steps", "1")
    run("examples/reasoner/train_moe.py", *options, "--num_steps", "2")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", sorted(file.name for file in (ROOT / "examples").glob("*.*")))
def test_every_example_is_on_a_page(name):
    assert f"`examples/{name}`" in (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")


def test_the_app_tells_what_to_install(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"needs Gradio: pip install hf_sirius\[demo\]") as raised:
        import app  # noqa: F401
    assert raised.value.__cause__ is None


@pytest.mark.slow
def test_the_hybrid_trains_goes_on_and_is_written(tmp_path):
    """Of a few tokens nothing is learnt; what it writes is a model and problems."""
    options = ["--output_dir", str(tmp_path), "--batch_size", "2", "--num_problems", "3", "--save_every", "1"]
    for num_steps in ("1", "2"):
        run("examples/reasoner/hybrid.py", "--num_steps", num_steps, *options)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert len((tmp_path / "test.jsonl").read_text().splitlines()) == 3
