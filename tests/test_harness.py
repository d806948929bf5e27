"""The lm-evaluation-harness with Sirius: its own runs and requests, on the embedded reasoner."""

import inspect
import json
import os
import subprocess
import sys
import types

import lm_eval
import peft
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sirius import Calibration, SiriusConfig, calibrate, reasoner_path, reasoner_problems
from hf_sirius.harness import _FIELDS, SiriusLM
from hf_sirius.study.evaluation import run_task, standard_modes
from hf_sirius.study.problems import problem_prompt
from hf_sirius.study.tasks import ProblemTask


PROBLEMS = reasoner_problems()[:5]
OFFLINE = {"HF_HUB_OFFLINE": "1"}
PROMPTS = [problem_prompt(problem["question"]) for problem in PROBLEMS]
TASK = {
    "task": "reasoner_problems",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer.split('####')[-1].strip()}}",
    "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 200},
    "filter_list": [
        {
            "name": "final",
            "filter": [{"function": "regex", "regex_pattern": "#### (-?[0-9.,]+)"}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("data")
    file = directory / "problems.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return {**TASK, "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(directory / "cache")}}


@pytest.fixture(scope="module")
def task_manager() -> TaskManager:
    return TaskManager(include_defaults=False)  # which takes a while to index


@pytest.fixture(scope="module")
def dense() -> HFLM:
    return HFLM(reasoner_path(), device="cpu")


@pytest.fixture(scope="module")
def lossless() -> SiriusLM:
    return SiriusLM(
        "reasoner", device="cpu", batch_size="auto", max_batch_size=4, method="griffin", density=0.3, threshold=1.0
    )


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, arguments[i], i) for i in range(len(arguments))]


def answers(lm: HFLM, prompts=PROMPTS, **generation_kwargs) -> list[str]:
    options = {"until": [], "max_gen_toks": 200, **generation_kwargs}
    return lm.generate_until(requests("generate_until", [(prompt, options) for prompt in prompts]), disable_tqdm=True)


# Runs


@pytest.mark.slow
def test_accuracy_is_that_of_our_own_evaluation(task, task_manager, tmp_path):
    # Everything drafted is kept, so that answers are wrong in many ways.
    config = SiriusConfig(method="griffin", density=0.4, threshold=0.0, kernel_size=12)
    results = lm_eval.simple_evaluate(
        "hf-sirius", "pretrained=reasoner,method=griffin,density=0.4,threshold=0.0,kernel_size=12", tasks=[task],
        batch_size=3, device="cpu", task_manager=task_manager, bootstrap_iters=0,
    )  # fmt: skip
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(reasoner_path()),
        AutoTokenizer.from_pretrained(reasoner_path()),
    )
    ours = ProblemTask("ours", PROBLEMS, tokenizer, chat=False, max_new_tokens=200)
    rows = run_task(model, ours, standard_modes(config)[2:], tmp_path, "reasoner")["rows"]
    assert results["results"]["reasoner_problems"]["exact_match,final"] == rows[0]["accuracy"]
    assert 0 < rows[0]["accuracy"] < 1

    records = [json.loads(line) for line in (tmp_path / "records-0.jsonl").read_text().splitlines()]
    samples = sorted(results["samples"]["reasoner_problems"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0].strip() for sample in samples] == [record["text"].strip() for record in records]
    measures = results["config"]["sirius"]
    assert {name: rows[0][name] for name in ("aal", "acceptance_rate", "draft_density")}.items() <= measures.items()
    assert results["config"]["sirius_config"] == config.to_dict()


def test_a_model_with_an_adapter(dense, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=64)
    model = AutoModelForCausalLM.from_pretrained(reasoner_path())
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    options = {"peft": str(tmp_path), "device": "cpu"}
    lm = SiriusLM("reasoner", method="griffin", density=0.9, threshold=1.0, **options)
    written = answers(lm, PROMPTS[:1], max_gen_toks=40)
    assert written == answers(HFLM(reasoner_path(), **options), PROMPTS[:1], max_gen_toks=40)
    assert written != answers(dense, PROMPTS[:1], max_gen_toks=40) and lm.sparse.stats.total.num_accepted


@pytest.mark.slow
def test_command_line_in_a_process_of_its_own(task, tmp_path):
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    command = [
        sys.executable, "-m", "hf_sirius.harness", "--model", "hf-sirius", "--model_args",
        "pretrained=reasoner,method=griffin,density=0.3", "--tasks", "task.yaml", "--limit", "1", "--device", "cpu",
        "--output_path", "out",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=os.environ | OFFLINE)
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout and "Sirius, all answers so far: GenerationStats(kernel_size=16" in done.stderr
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert results["results"]["reasoner_problems"]["exact_match,final"] == 1.0
    assert results["config"]["sirius"]["num_rolled_back"] > 0


ENTRY_POINT = """
from importlib.metadata import entry_points
from lm_eval.api.registry import get_model, model_registry
import lm_eval.models, sys

(entry,) = entry_points(group="lm_eval.models", name="hf-sirius")
if "hf-sirius" not in model_registry:  # what versions of the harness do that look for entry points
    model_registry.register(entry.name, target=entry)
assert "hf_sirius" not in sys.modules
assert get_model("hf-sirius").__module__ == "hf_sirius.harness" and get_model("hf").__name__ == "HFLM"
"""


def test_it_is_registered(tmp_path):
    assert get_model("hf-sirius") is SiriusLM
    done = subprocess.run([sys.executable, "-c", ENTRY_POINT], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["lm_eval", "lm_eval.api.registry"])
def test_without_the_harness_the_error_tells_what_to_install(missing, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "hf_sirius.harness")

    def find_spec(name, *rest):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [types.SimpleNamespace(find_spec=find_spec), *sys.meta_path])
    with pytest.raises(ImportError, match=r"pip install hf_sirius\[eval\]") as raised:
        import hf_sirius.harness  # noqa: F401
    assert (raised.value.__cause__ is None) == (missing == "lm_eval")


# Requests


def test_at_threshold_one_the_answers_are_those_of_hf(dense, lossless):
    lossless.sparse.stats.reset()
    assert answers(lossless) == answers(dense)
    assert lossless.sparse.stats.total.num_rolled_back > 0
    assert lossless.batch_size == "auto"


def test_likelihoods_are_those_of_hf(dense, lossless):
    lossless.sparse.stats.reset()
    pairs = [(prompt, f" {problem['answer']}") for prompt, problem in zip(PROMPTS, PROBLEMS, strict=True)]
    expected = dense.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    got = lossless.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert lossless.sparse.stats.total.num_cycles == 0 and max(lossless.batch_sizes.values()) > 1


def test_a_stop_string_in_what_was_rolled_back_does_not_stop(lossless):
    (answer,) = answers(lossless, PROMPTS[:1])
    decode = lossless.tokenizer.decode
    cycles = lossless.sparse.stats.cycles
    rolled_back = [decode([token]).strip() for cycle in cycles for token in cycle.drafted_ids[cycle.num_accepted :]]
    until = sorted({text for text in rolled_back if text and text not in answer})
    assert until
    assert answers(lossless, PROMPTS[:1], until=until) == [answer]


@pytest.mark.parametrize("until", ["=", [". 1", "- 7"], "####"])
def test_stop_strings_stop(until, dense, lossless):
    stopped = answers(lossless, PROMPTS[:2], until=until)
    assert stopped == answers(dense, PROMPTS[:2], until=until)
    for text in [until] if isinstance(until, str) else until:
        assert text not in "".join(stopped)


def test_options_of_a_task_keep_their_meaning(lossless):
    (answer,) = answers(lossless, PROMPTS[:1])
    (short,) = answers(lossless, PROMPTS[:1], max_gen_toks=9)
    assert answer.startswith(short) and len(lossless.tok_encode(short, add_special_tokens=False)) == 9
    assert answers(lossless, PROMPTS[:1], do_sample=True, temperature=1e-3) == [answer]
    torch.manual_seed(0)
    assert answers(lossless, PROMPTS[:1], temperature=5.0, max_gen_toks=9) != [short]
    assert answers(lossless, PROMPTS[:1], do_sample=False, temperature=5.0, max_gen_toks=9) == [short]


# Arguments


def test_no_argument_of_hf_is_a_field():
    assert not inspect.signature(HFLM.__init__).parameters.keys() & _FIELDS.keys()


def test_numbers_may_come_as_strings_and_a_calibration_as_its_directory(tmp_path):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(reasoner_path()),
        AutoTokenizer.from_pretrained(reasoner_path()),
    )
    calibrate(model, tokenizer, PROMPTS, max_tokens=200).save_pretrained(tmp_path)
    lm = SiriusLM(
        "reasoner", device="cpu", method="cats", density="0.25", kernel_size="8", threshold=1, calibration=str(tmp_path)
    )
    config = lm.sparse.sirius_config
    assert (config.density, config.kernel_size, config.threshold) == (0.25, 8, 1)
    assert isinstance(config.calibration, Calibration)


def test_a_model_may_be_given():
    model = AutoModelForCausalLM.from_pretrained(reasoner_path())
    lm = SiriusLM(model, tokenizer=AutoTokenizer.from_pretrained(reasoner_path()), density=0.3)
    assert lm.sparse.dense_model is model and lm.sparse.sirius_config.density == 0.3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"density": 2}, "density must be in"),
        ({"density": "half"}, "density must be a number, got 'half'"),
        ({"kernel_size": "8.5"}, "kernel_size must be an int or 'auto', got '8.5'"),
        ({"method": "griffon"}, "griffon"),
        ({"densty": 0.5}, "field of SiriusConfig .*'densty'"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SiriusLM("reasoner", device="cpu", **arguments)
