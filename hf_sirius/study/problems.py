"""Word problems and prompts: how they are read, how a question is put, and what the answer is."""

import json
import os
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..reasoner import reasoner_problems


# A number behind the mark, maybe with a currency or emphasis around it. The beginning of "3/4", "10:30" or "1e5" is no
# such number, and neither is that of a heading ("#### 1. Compute ...").
_ANSWER = re.compile(
    r"####[ \t]*[*$€£\\({\[]*(?:boxed\{)?(?P<sign>[-−+]?)[$€£]?[ \t]*(?P<number>\d[\d,]*(?:\.\d+)?|\.\d+)"
    r"(?![\d/:]|[eE]\d|\.\d|\.[ \t]+\w)"
)


def problem_prompt(question: str) -> str:
    """Returns the prompt of a problem, the one of lm-evaluation-harness' GSM8K task."""
    return f"Question: {question}\nAnswer:"


def final_answer(text: str) -> str | None:
    """Returns the number behind the first "####" that has one, in its shortest decimal form, or `None`."""
    if not (found := _ANSWER.search(text)):
        return None
    try:
        number = f"{Decimal(found['number'].replace(',', '')):f}"
    except InvalidOperation:
        return None
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return f"-{number}" if found["sign"] in ("-", "−") and number != "0" else number


def load_problems(path: str | os.PathLike) -> list[dict]:
    """Returns the problems of a JSONL file of GSM8K's form: `question`, and an `answer` that ends in "#### 42".

    Raises:
        `ValueError` with the number of the first line that is no such problem. Empty lines are skipped.
    """
    problems = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            problem = json.loads(line)
        except ValueError as error:  # of the encoding as well
            raise ValueError(f"{place}: not valid JSON ({error}): mend or remove the line") from error
        if not isinstance(problem, dict) or not all(
            isinstance(problem.get(name), str) for name in ("question", "answer")
        ):
            raise ValueError(f'{place}: a problem is an object with the texts "question" and "answer", got {problem!r}')
        if final_answer(problem["answer"]) is None:
            raise ValueError(f'{place}: the answer must end in "#### " and a number, got {problem["answer"][-40:]!r}')
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} has no problem: each line is an object with the texts question and answer")
    return problems


def read_prompts(path: str | os.PathLike, chat: bool = False) -> list[str]:
    """Returns the prompts of a file: each line of a `.jsonl` is an object with a `prompt` (or a `question`, as in
    [`load_problems`]), each line of any other file is a prompt. Empty lines are skipped.

    Args:
        chat: whether the prompts are for a chat template, which takes a question as it is.

    Raises:
        `ValueError` with the number of the first line that is no prompt, `OSError` if the file cannot be read.
    """
    prompts = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        place = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").strip()
            value = json.loads(text) if text and Path(path).suffix == ".jsonl" else {"prompt": text}
        except ValueError as error:
            raise ValueError(f"{place}: not valid ({error}): mend or remove the line") from error
        value = value if isinstance(value, dict) else {}
        prompt = value.get("prompt", value.get("question"))
        if not isinstance(prompt, str):
            raise ValueError(f'{place}: a prompt is an object with the text "prompt" or "question", got {text!r}')
        if prompt:
            prompts.append(prompt if chat or "prompt" in value else problem_prompt(prompt))
    if not prompts:
        raise ValueError(f"{path} has no prompt: write one on each line")
    return prompts


def long_prompts(chat: bool = False) -> list[str]:
    """Returns the embedded reasoner's 20 long problems as prompts, for a chat template or not, as `read_prompts`."""
    questions = [problem["question"] for problem in reasoner_problems("long")]
    return questions if chat else [problem_prompt(question) for question in questions]


def tokenize(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> BatchEncoding:
    """Returns what the tokenizer makes of a prompt, in its chat template or not; `input_ids` are long [1, length]."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
