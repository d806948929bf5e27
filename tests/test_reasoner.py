"""The embedded reasoner: a real trained model, with a lossless tokenizer and unseen problems."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sirius import make_sparse, reasoner_path, reasoner_problems
from hf_sirius.study.problems import problem_prompt
from hf_sirius.study.tasks import ProblemTask


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(reasoner_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(reasoner_path()).eval()


@pytest.fixture
def data(monkeypatch):
    """The data generator of examples/reasoner."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "reasoner"))
    import problems

    yield problems
    sys.modules.pop("problems")


def test_package_data_is_small():
    files = [file for file in Path(reasoner_path()).iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {file.name for file in files}


def test_tokenizer_is_fast_and_lossless(tokenizer):
    assert tokenizer.is_fast
    for problem in reasoner_problems():
        text = f"{problem_prompt(problem['question'])} {problem['answer']}"
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_gives_the_prompt_of_training(tokenizer):
    question = reasoner_problems()[0]["question"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert chat["input_ids"] == tokenizer(problem_prompt(question))["input_ids"]


def test_problems_are_of_the_test_split_and_right(data):
    problems = reasoner_problems()
    assert len(problems) == 500 and len({problem["question"] for problem in problems}) == 500
    for problem in problems:
        assert data.split_of(problem["question"]) == "test"
        assert 6 <= problem["num_steps"] <= 10
        equations, answer = problem["answer"].split("####")
        steps = [step.strip() for step in equations.split(".") if step.strip()]
        assert len(steps) == problem["num_steps"]
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert int(answer) == int(right)


def test_training_problems_are_never_test_problems(data):
    source = data.problems("train", 0, 4, 10)
    assert all(data.split_of(next(source)["question"]) == "train" for _ in range(300))


@pytest.mark.slow
def test_sparsity_loses_reasoning_and_sirius_restores_it(model, tokenizer):
    task = ProblemTask("reasoner", reasoner_problems()[300:360], tokenizer)

    def measure(*way) -> dict:
        return task.measures([task.run(i, model, *way) for i in range(len(task))])

    dense = measure()["accuracy"]
    assert dense >= 0.9
    with make_sparse(model, method="griffin", density=0.5) as sparse:
        assert measure(sparse, False)["accuracy"] <= dense - 0.1
        corrected = measure(sparse)
        assert corrected["accuracy"] >= dense - 0.04  # two of 60 problems; the README's table is over 300
        assert corrected["aal"] >= 14


def test_wide_margins_make_float32_outputs_equal_at_threshold_one(model, tokenizer):
    with make_sparse(model, method="griffin", density=0.3, threshold=1.0, kernel_size=16) as sparse:
        for problem in reasoner_problems()[:5]:
            inputs = tokenizer(problem_prompt(problem["question"]), return_tensors="pt")
            options = {"max_new_tokens": 200, "do_sample": False}
            dense = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
            top = torch.stack(dense.logits).squeeze(1).topk(2).values
            assert (top[:, 0] - top[:, 1]).min() > 1e-3  # no tie that rounding could decide
            assert torch.equal(model.generate(**inputs, **options, assistant_model=sparse), dense.sequences)
