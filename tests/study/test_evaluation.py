"""Runs of a task: what they write, how they go on after an interruption, and over several processes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny import build_model, build_tokenizer, shared_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sirius import SiriusConfig, calibrate, make_sparse, reasoner_path, reasoner_problems
from hf_sirius.cli.main import main
from hf_sirius.study import evaluation
from hf_sirius.study.evaluation import default_directory, describe_run, run_task, standard_modes
from hf_sirius.study.problems import final_answer, problem_prompt
from hf_sirius.study.tasks import ProblemTask, load_task
from hf_sirius.study.timing import generator


CONFIG = SiriusConfig(method="griffin", density=0.3, kernel_size=5)
PROBLEMS = [{"question": f"w{i} w{i + 1} w{i + 2}", "answer": "#### 1"} for i in range(1, 6)]
TIMED = ("ms_per_token",)
EVAL = ["eval", "--num_items", "4", "--method", "griffin", "--density", "0.3"]


def make_task(num_problems: int = 5) -> ProblemTask:
    return ProblemTask("mine", PROBLEMS[:num_problems], build_tokenizer(), max_new_tokens=9)


def figures(results: dict) -> list[dict]:
    """The rows without what a clock gave."""
    return [{name: value for name, value in row.items() if name not in TIMED} for row in results["rows"]]


def read_results(directory) -> dict:
    return json.loads((directory / "results.json").read_text())


def run_tiny(directory, task=None, modes=None) -> dict:
    return run_task(shared_model(), task or make_task(), modes or standard_modes(CONFIG), directory, "tiny")


# Figures


@pytest.fixture(scope="module")
def reasoner():
    path = reasoner_path()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.mark.slow
def test_figures_are_those_of_the_calls(reasoner, tmp_path):
    model, tokenizer = reasoner
    task = load_task("reasoner", tokenizer, num_items=4, max_new_tokens=200)
    rows = {row["way"]: row for row in run_task(model, task, standard_modes(CONFIG), tmp_path, "reasoner")["rows"]}

    def accuracy(generate) -> float:
        num_correct = 0
        for problem in reasoner_problems()[:4]:
            inputs = tokenizer(problem_prompt(problem["question"]), return_tensors="pt")
            output = generate(**inputs, max_new_tokens=200, do_sample=False)
            answer = tokenizer.decode(output[0], skip_special_tokens=True).rpartition("#### ")[2]
            num_correct += answer == final_answer(problem["answer"])
        return num_correct / 4

    assert rows["dense"]["accuracy"] == accuracy(model.generate)
    with make_sparse(model, CONFIG) as sparse:
        for name, corrected in (("sparse alone", False), ("Sirius", True)):
            sparse.stats.reset()
            assert rows[name]["accuracy"] == accuracy(generator(model, sparse, corrected))
            for measure in ("aal", "acceptance_rate", "draft_density", "effective_density"):
                assert rows[name][measure] == getattr(sparse.stats.total, measure), measure
    assert rows["sparse alone"]["accuracy"] < rows["Sirius"]["accuracy"] and rows["Sirius"]["num_rolled_back"] > 0
    assert rows["dense"]["aal"] is None and rows["dense"]["ms_per_token"] > 0


def test_json_and_csv_say_the_same(tmp_path):
    results = run_tiny(tmp_path)
    assert read_results(tmp_path) == json.loads(json.dumps(results))
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["way"] for line in lines] == ["dense", "sparse alone", "Sirius"]
    assert lines[2]["density"] == "0.3" and lines[0]["density"] == ""
    for line, row in zip(lines, results["rows"], strict=True):
        assert line["aal"] == ("" if row["aal"] is None else str(row["aal"]))


# Interruptions


class Interrupted(ProblemTask):
    """Ends after so many items, as Ctrl-C would."""

    def __init__(self, num_items: int):
        super().__init__("mine", PROBLEMS, build_tokenizer(), max_new_tokens=9)
        self.num_left = num_items

    def run(self, *args, **kwargs):
        if not self.num_left:
            raise KeyboardInterrupt
        self.num_left -= 1
        return super().run(*args, **kwargs)


@pytest.mark.parametrize("cut", [b"", b'{"way": "x", "it', b'{"way"'])
def test_an_interrupted_run_goes_on(tmp_path, cut):
    whole = run_tiny(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "run", Interrupted(7))
    assert not (tmp_path / "run" / "results.json").exists()
    file = tmp_path / "run" / "records-0.jsonl"
    assert len(file.read_bytes().splitlines()) == 7
    file.write_bytes(file.read_bytes() + cut)  # the process died while it wrote
    going_on = Interrupted(8)
    results = run_tiny(tmp_path / "run", going_on)
    assert going_on.num_left == 0  # and not one item more
    assert figures(results) == figures(whole) == figures(read_results(tmp_path / "run"))
    assert run_tiny(tmp_path / "run", Interrupted(0)) == results  # timings included: nothing was run


def test_no_mode_of_a_wider_run_is_run_twice(tmp_path):
    modes = standard_modes(CONFIG)
    run_tiny(tmp_path, modes=modes[:1])
    task = Interrupted(10)
    run_tiny(tmp_path, task, modes)
    assert task.num_left == 0


def test_a_broken_record_in_the_middle_is_named(tmp_path):
    run_tiny(tmp_path)
    file = tmp_path / "records-0.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], "{", *lines[4:]]) + "\n")
    with pytest.raises(ValueError, match=r"records-0\.jsonl, line 4: not valid JSON"):
        run_tiny(tmp_path)


def test_another_run_in_the_directory_is_refused(tmp_path):
    run_tiny(tmp_path)
    before = (tmp_path / "records-0.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"holds another run \(num_items: 5 there, 4 here; .*--output_dir"):
        run_tiny(tmp_path, make_task(4))
    with pytest.raises(ValueError, match="which is a file"):
        run_tiny(tmp_path / "run.json")
    assert (tmp_path / "records-0.jsonl").read_bytes() == before


def with_template(tokenizer, template: str):
    tokenizer.chat_template = template
    return tokenizer


def other_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[7, 30] += 1  # in the midst


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_weight, "weights: '[0-9a-f]{16}' there, '[0-9a-f]{16}' here"),
        (lambda model: setattr(model.config, "rms_norm_eps", 0.5), "model_config.rms_norm_eps: 1e-06 there, 0.5 here"),
        (
            lambda model: setattr(model.generation_config, "repetition_penalty", 1.5),
            "generation.repetition_penalty: None there, 1.5 here",
        ),
        (
            lambda model: setattr(model.generation_config, "eos_token_id", [3]),
            r"generation.eos_token_id: None there, \[3\] here",
        ),
    ],
)
def test_a_model_that_answers_otherwise_is_another_run(tmp_path, change, told):
    model, modes = build_model(seed=3), standard_modes(CONFIG)[:1]
    results = run_task(model, make_task(1), modes, tmp_path, "tiny")
    assert run_task(model, make_task(1), modes, tmp_path, "tiny") == results
    change(model)
    with pytest.raises(ValueError, match=rf"holds another run \({told}\)"):
        run_task(model, make_task(1), modes, tmp_path, "tiny")


def test_other_prompts_and_answers_are_another_run(tmp_path):
    def run(problem, *args, **options):
        task = ProblemTask("mine", [problem], *args, max_new_tokens=9, **options)
        return run_tiny(tmp_path, task, standard_modes(CONFIG)[:1])

    problem, shot = PROBLEMS[0], PROBLEMS[1]
    tokenizer = with_template(build_tokenizer(), "{{ messages[-1]['content'] }} w3")
    results = run(problem, tokenizer)
    assert run(dict(problem), tokenizer) == results
    with pytest.raises(ValueError, match=r"another run \(prompts: '[0-9a-f]{12}.* there, .* here\)"):
        run(problem, with_template(build_tokenizer(), "{{ messages[-1]['content'] }} w4"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w3"
    with pytest.raises(ValueError, match=r"another run \(prompts: "):
        run(problem, tokenizer, [shot])
    with pytest.raises(ValueError, match=r"another run \(chat: True there, False here; prompts: "):
        run(problem, tokenizer, chat=False)
    with pytest.raises(ValueError, match=r"another run \(answers: "):
        run({**problem, "answer": "#### 2"}, with_template(tokenizer, "{{ messages[-1]['content'] }} w3"))


def test_other_versions_are_another_run(tmp_path, monkeypatch):
    run_tiny(tmp_path)
    monkeypatch.setattr(evaluation.transformers, "__version__", "5.99")
    with pytest.raises(ValueError, match=r"another run \(transformers: '5\.\d+\.\d+' there, '5.99' here\)"):
        run_tiny(tmp_path)


def test_a_run_of_an_earlier_version_is_told(tmp_path):
    run_tiny(tmp_path)
    run_file = tmp_path / "run.json"
    earlier = {**json.loads(run_file.read_text()), "format": 2}
    del earlier["prompts"]
    run_file.write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match=r"did not write down all that answers depend on .format 2,.*--output_dir"):
        run_tiny(tmp_path)


def test_records_without_their_description_are_refused(tmp_path):
    run_tiny(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="holds records without the run"):
        run_tiny(tmp_path)


def test_a_tree_s_nodes_are_in_both_files(tmp_path):
    run_tiny(tmp_path, make_task(1), standard_modes(CONFIG.replace(tree_width=3)))
    with open(tmp_path / "results.csv", newline="") as file:
        nodes = [line["nodes_per_cycle"] for line in csv.DictReader(file)]
    assert nodes[0] == "" and float(nodes[2]) == read_results(tmp_path)["rows"][2]["nodes_per_cycle"]


def test_a_calibration_is_part_of_the_mode_and_its_config_can_be_read_back():
    model, texts = shared_model(), [{"input_ids": list(range(1, 40))}]
    config = SiriusConfig(calibration=calibrate(model, None, texts, progress=False))
    mode = standard_modes(config)[2]
    assert mode.key != standard_modes(SiriusConfig())[2].key and mode.description()["calibration"]
    assert SiriusConfig.from_dict(mode.description()["config"]) == SiriusConfig(kernel_size=16)


def test_each_run_has_a_directory_of_its_own_by_default():
    def directory(name="tiny", task=None, config=CONFIG, model=None):
        description = describe_run(model or shared_model(), name, task or make_task())
        return default_directory(description, standard_modes(config))

    others = [directory("some/tiny"), directory(task=make_task(4)), directory(config=CONFIG.replace(threshold=0.3))]
    others.append(directory(model=build_model(dtype=torch.float32)))
    assert len({directory(), *others}) == 5 and directory() == directory()
    assert all(name.parent == Path("runs") for name in others)


def start(*command: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_evaluation_ends_with_the_same_figures(tmp_path, capsys):
    assert main([*EVAL, "--output_dir", str(tmp_path / "whole")]) == 0
    directory = tmp_path / "killed"
    command = [*EVAL, "--output_dir", str(directory)]
    process = start("-m", "hf_sirius.cli", *command)
    records = directory / "records-0.jsonl"
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = records.read_bytes().rpartition(b"\n")[0]
    assert not (directory / "results.json").exists() and 3 <= kept.count(b"\n") + 1 < 12
    assert main(command) == 0
    assert records.read_bytes().startswith(kept)
    assert figures(read_results(directory)) == figures(read_results(tmp_path / "whole"))
    assert "accuracy" in capsys.readouterr().out


# Several processes


class Waiting(ProblemTask):
    """Waits within its first item."""

    def __init__(self):
        super().__init__("mine", PROBLEMS, build_tokenizer(), max_new_tokens=9)
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def run(self, *args, **kwargs):
        self.has_begun.set()
        assert self.may_go_on.wait(60)
        return super().run(*args, **kwargs)


def test_two_runs_at_once_do_not_share_a_directory(tmp_path):
    task = Waiting()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_tiny, tmp_path, task)
        try:
            assert task.has_begun.wait(60)
            with pytest.raises(ValueError, match=r"another process is at work in .*--output_dir"):
                run_tiny(tmp_path)
        finally:
            task.may_go_on.set()
    records = (tmp_path / "records-0.jsonl").read_bytes()
    assert run_tiny(tmp_path) == first.result() and records.count(b"\n") == 15


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys, time\nfrom filelock import FileLock\n"
    code += "with FileLock(sys.argv[1]):\n print('held', flush=True)\n time.sleep(600)"
    process = start("-c", code, str(tmp_path / "run.lock"))
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process is at work"):
        run_tiny(tmp_path)
    process.kill()
    process.communicate()
    assert (tmp_path / "run.lock").exists()
    run_tiny(tmp_path)


@pytest.mark.slow
def test_no_process_of_a_second_launch_works_in_a_directory_that_is_taken(tmp_path):
    options = ["eval", "--num_items", "1", "--output_dir", str(tmp_path)]
    with FileLock(tmp_path / "run.lock"):
        process = start("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_sirius.cli", *options)
        output, _ = process.communicate(timeout=240)
    assert process.returncode != 0 and "another process is at work" in output
    assert [file.name for file in tmp_path.iterdir()] == ["run.lock"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        ("torch.distributed.run", "--nproc_per_node", "2"),
    ],
    ids=["accelerate", "torchrun"],
)
def test_two_processes_give_the_figures_of_one(tmp_path, launcher):
    command = ["eval", "--num_items", "3", "--method", "griffin", "--density", "0.3", "--output_dir"]
    assert main([*command, str(tmp_path / "one")]) == 0
    module, *options = launcher
    process = start("-m", module, *options, "-m", "hf_sirius.cli", *command, str(tmp_path / "two"))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("Written: ") == 1
    assert figures(read_results(tmp_path / "two")) == figures(read_results(tmp_path / "one"))
    sizes = [len((tmp_path / "two" / f"records-{i}.jsonl").read_text().splitlines()) for i in range(2)]
    assert sizes == [6, 3]
    # And one process goes on with what two have done.
    before = (tmp_path / "two" / "results.json").read_bytes()
    assert main([*command, str(tmp_path / "two")]) == 0
    assert (tmp_path / "two" / "results.json").read_bytes() == before


# The command line


def test_eval_of_a_file_of_problems(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.jsonl"
    lines = [
        json.dumps({name: problem[name] for name in ("question", "answer")}) for problem in reasoner_problems()[:2]
    ]
    file.write_text("\n".join(lines) + "\n")
    assert main(["eval", "--task", str(file), "--method", "griffin"]) == 0
    printed = capsys.readouterr().out
    assert "2 items of mine.jsonl" in printed and "sparse alone" in printed and "accuracy" in printed
    (directory,) = (tmp_path / "runs").iterdir()
    kept = (directory / "records-0.jsonl").read_bytes()
    file.write_text(lines[0] + "\n{broken\n")
    assert main(["eval", "--task", str(file), "--method", "griffin"]) == 2
    assert "mine.jsonl, line 2: not valid JSON" in capsys.readouterr().err
    assert (directory / "records-0.jsonl").read_bytes() == kept


def test_eval_of_a_model_whose_files_changed_is_another_run(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(reasoner_path(), model)
    command = ["eval", "--model", str(model), "--num_items", "1", "--max_new_tokens", "5"]
    command += ["--output_dir", str(tmp_path / "run")]
    assert main(command) == 0 == main(command)
    kept = (tmp_path / "run" / "records-0.jsonl").read_bytes()
    generation = model / "generation_config.json"
    before = generation.read_text()
    generation.write_text(json.dumps({**json.loads(before), "no_repeat_ngram_size": 2}))
    assert main(command) == 2
    assert "holds another run (generation.no_repeat_ngram_size: None there, 2 here)" in capsys.readouterr().err
    generation.write_text(before)
    (model / "chat_template.jinja").write_text("Question: {{ messages[-1]['content'] }}\nAnswer:\n")
    assert main(command) == 2
    assert "holds another run (prompts: " in capsys.readouterr().err
    assert (tmp_path / "run" / "records-0.jsonl").read_bytes() == kept


def test_half_a_character_is_told_before_anything_runs(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "q", "answer": "#### 1"}\n{"question": "a \\ud800", "answer": "#### 1"}\n')
    assert main(["eval", "--task", str(file), "--output_dir", str(tmp_path / "run")]) == 2
    assert "mine.jsonl, line 2: '\\ud800' is half of a character" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_eval_of_plain_text(tmp_path, capsys):
    file = tmp_path / "mine.txt"
    file.write_text(" ".join(problem["question"] for problem in reasoner_problems()[:9]))
    options = ["--window", "64", "--num_items", "2", "--output_dir", str(tmp_path / "run")]
    assert main(["eval", "--task", str(file), *options]) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "agreement" in printed and "Sirius" not in printed


def test_what_a_twin_would_refuse_is_refused_before_anything_runs(tmp_path, capsys):
    options = ["--method", "griffin", "--draft_memory", "1KiB", "--output_dir", str(tmp_path / "run")]
    assert main([*EVAL[:3], *options]) == 2
    assert "draft_memory" in capsys.readouterr().err and not (tmp_path / "run").exists()
