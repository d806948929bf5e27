"""How the command line starts: what it imports, how it is called, and how it ends."""

import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf_sirius.cli import options
from hf_sirius.cli.main import main


# Ends with the status of a command line, and tells which of the slow packages it has imported.
STARTED = """
import sys
from hf_sirius.cli.main import main
try:
    status = main({argv})
except SystemExit as ended:
    status = ended.code
print(status, sorted({{"torch", "transformers", "numpy", "rich"}} & set(sys.modules)))
"""
GENERATE = ["generate", "--model", "reasoner", "--prompt", "a"]


def run_python(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        ([], 2),
        (["--help"], 0),
        (["--version"], 0),
        *(([command, "--help"], 0) for command in ("demo", "generate", "report", "eval", "sweep", "tune")),
        *((["bench", name, "--help"], 0) for name in ("decode", "offload", "drafts")),
        ([*GENERATE, "--methd", "griffin"], 2),
        ([*GENERATE, "--density", "half"], 2),
        ([*GENERATE, "--density", "2"], 2),
        ([*GENERATE, "--method", "grifin"], 2),
        ([*GENERATE, "--compile_draft", "--tree_width", "2", "--method", "griffin"], 2),
        ([*GENERATE, "--draft_dtype", "int9"], 2),
        (["sweep", "--densities", "0.5", "2"], 2),
        (["sweep", "--methods", "grifin"], 2),
        (["generate", "--model", "reasoner", "--prompt", " "], 2),
        (["generate", "--model", "./nope", "--prompt", "a"], 2),
        (["report", "--model", "reasoner", "--prompt", "a", "--output", "nowhere/page.html"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_help_and_errors_import_nothing_slow(argv, status):
    done = run_python("-c", STARTED.format(argv=argv))
    assert done.stdout.splitlines()[-1] == f"{status} []", done.stderr
    assert "Traceback" not in done.stderr


def test_settings_do_without_torch():
    program = (
        "import sys; import hf_sirius.settings.fields, hf_sirius.study.named_models; print('torch' in sys.modules)"
    )
    assert run_python("-c", program).stdout.strip() == "False"


def test_without_a_command_help_is_shown_and_the_status_is_that_of_an_error(capsys):
    for argv in ([], ["bench"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        printed = capsys.readouterr()
        assert ended.value.code == 2 and not printed.out and printed.err.startswith("usage: hf-sirius")
        assert ("\n  hf-sirius demo\n" in printed.err) == (argv == [])


def test_the_first_command_of_the_help_is_one(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert len(told.splitlines()) < 30
    example = told[told.index("hf-sirius generate") :].replace("\\\n", "")
    words = shlex.split(example)
    assert main([*words[1:], "--method", "griffin"]) == 0
    assert "#### 20" in capsys.readouterr().out


def test_the_package_is_the_command_line():
    done = run_python("-m", "hf_sirius", "--version")
    assert done.stdout.startswith("hf_sirius ")
    done = run_python("-m", "hf_sirius", "generate", "--help")
    assert done.stdout.startswith("usage: python -m hf_sirius generate ")
    done = run_python("-m", "hf_sirius", *GENERATE, "--density", "2")
    assert done.returncode == 2 and done.stderr.startswith("python -m hf_sirius: error: density must be in (0, 1]")


@pytest.mark.parametrize("argv", [["--traceback", *GENERATE], [*GENERATE, "--traceback"]])
def test_a_traceback_is_shown_wherever_it_is_asked_for(argv):
    with pytest.raises(ValueError, match="density must be in"):
        main([*argv, "--density", "2"])


@pytest.mark.parametrize("name", ["decode", "offload"])
def test_a_benchmark_has_a_traceback_as_well(name):
    with pytest.raises(ValueError, match="density must be in"):
        main(["bench", name, "--density", "2", "--traceback"])


# Stands in for a package that takes long, and hides interrupts, as an import's own bookkeeping does.
SLOW = """
import sys, time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    raise ImportError("hidden")
"""


def test_ctrl_c_during_imports_ends_in_a_line(tmp_path):
    (tmp_path / "torch.py").write_text(SLOW)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_sirius", *GENERATE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.1)  # until it sleeps
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "\npython -m hf_sirius: interrupted\n")


def test_ctrl_c_in_a_command_ends_in_a_line_and_leaves_the_handler(monkeypatch, capsys):
    from hf_sirius.cli import commands

    handler = signal.getsignal(signal.SIGINT)

    def interrupted(args):
        assert signal.getsignal(signal.SIGINT) is handler
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "demo", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "\nhf-sirius: interrupted\n"


@pytest.mark.parametrize("is_ignored", [False, True])
def test_what_ignores_ctrl_c_goes_on_ignoring_it(is_ignored, monkeypatch):
    from hf_sirius.cli import commands

    seen = []
    monkeypatch.setattr(options, "check", lambda args: seen.append(signal.getsignal(signal.SIGINT)))
    monkeypatch.setattr(commands, "demo", lambda args: seen.append(signal.getsignal(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if is_ignored else signal.default_int_handler)
    try:
        assert main(["demo"]) == 0
        during, after = seen
        assert after is (signal.SIG_IGN if is_ignored else signal.default_int_handler)
        assert (during is signal.SIG_IGN) == is_ignored and during is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_ends_it_quietly():
    command = [sys.executable, "-m", "hf_sirius", *GENERATE, "--max_new_tokens", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    with process.stderr:
        told = process.stderr.read()
    assert process.wait(timeout=300) == 141
    assert "Traceback" not in told and "pipe" not in told.lower()


def test_it_runs_in_any_thread(monkeypatch):
    from hf_sirius.cli import commands

    monkeypatch.setattr(commands, "demo", lambda args: None)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(main, ["demo"]).result() == 0
