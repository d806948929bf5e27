"""Word problems and prompts: how they are read, how a question is put, and what the answer is."""

import json
import os
import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..reasoner import reasoner_problems


_SPACES = " \u00a0\u2007\u2009\u202f"  # no-break and thin ones as well
_SEPARATORS = f",{_SPACES}"
# With every sign of a currency as "$". What leads to a number are spaces, currency, quotes, brackets and emphasis.
_NUMBER = re.compile(
    rf"""(?:[{_SPACES}\t$*`"'“”„‘’‚«»‹›\\(\[{{]|boxed\{{)*(?P<sign>[-−+]?)\$?"""
    rf"(?P<number>(?:[1-9][0-9]{{0,2}}(?P<separator>[{_SEPARATORS}])[0-9]{{3}}(?:(?P=separator)[0-9]{{3}})*|[0-9]+)"
    rf"(?:\.[0-9]+)?|\.[0-9]+)(?P<rest>.*)"
)
_HEADING = re.compile(r"[.:)]\s+\w")  # "1. Compute"
_SCALE = re.compile(rf"[{_SPACES}]*[kKMB]\b|[{_SPACES}-]*(?i:dozen|hundred|thousand|million|billion|trillion)")


def problem_prompt(question: str) -> str:
    """Returns the prompt of a problem, the one of lm-evaluation-harness' GSM8K task."""
    return f"Question: {question}\nAnswer:"


def final_answer(text: str) -> str | None:
    """Returns the number behind the first "####" that has one, in its shortest decimal form, such as "-1234.5".

    A number has the digits 0 to 9, with a point before decimals, and with a comma or a space (also a no-break or a thin
    one) before each three digits, or without any. A sign may stand before it. Currency, quotes, brackets and emphasis
    around it, and words and a percent sign behind it do not count: "$1,234.50 each" is 1234.5. A mark before words, or
    before the number of a heading ("1. Compute"), is passed by.

    `None` if there is no number, or if the line is not plainly one number: no other digit may follow in it ("12,5",
    "1.234,56", "12 3/4", "5 + 3", "10:30", "1e3"), and no word or letter that multiplies ("2 million", "10k").
    """
    marked = [part for line in text.splitlines() for part in re.split("#{4,}", line)[1:]]
    for part in marked:
        found = _NUMBER.match("".join("$" if unicodedata.category(char) == "Sc" else char for char in part))
        if not found:
            continue
        closing = ")" if "(" in found[0][: found.start("sign")] else ""
        rest = found["rest"].lstrip(closing)
        if _HEADING.match(rest):
            continue
        is_scaled = _SCALE.match(rest.lstrip(f"*`\"'”’»›]}}$\\{closing}"))
        if is_scaled or any(unicodedata.category(char)[0] == "N" for char in rest):
            return None
        number = f"{Decimal(re.sub(f'[{_SEPARATORS}]', '', found['number'])):f}"
        if "." in number:
            number = number.rstrip("0").rstrip(".")
        return f"-{number}" if found["sign"] in ("-", "−") and number != "0" else number
    return None


def read_text(path: str | os.PathLike) -> str:
    """Returns the text of a user's file in UTF-8, without a byte order mark.

    Raises:
        `ValueError` with the number of the first line that is no UTF-8, `OSError` if the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}: name one that is there") from error
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: not valid UTF-8 ({error.reason}): save the file as UTF-8") from error


def _numbered_lines(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """Yields each line of a file that is not empty, behind the place that errors tell."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _read_object(place: str, line: str) -> dict:
    """Returns the JSON object in a line, an empty one for any other value, or raises `ValueError`."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON ({error}): mend or remove the line") from error
    return value if isinstance(value, dict) else {}


def _check_characters(place: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {text[error.start]!a} is half of a character (a lone surrogate), which no tokenizer reads: mend "
            "or remove the line"
        ) from error


def load_problems(path: str | os.PathLike) -> list[dict]:
    """Returns the problems of a JSONL file of GSM8K's form: `question`, and an `answer` that ends in "#### 42".

    Raises:
        `ValueError` with the number of the first line that is no such problem. Empty lines are skipped.
    """
    problems = []
    for place, line in _numbered_lines(path):
        problem = _read_object(place, line)
        texts = [problem.get(name) for name in ("question", "answer")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{place}: a problem is an object with the texts "question" and "answer", got {line!r}')
        _check_characters(place, "".join(texts))
        if final_answer(problem["answer"]) is None:
            raise ValueError(
                f'{place}: the answer must end in "#### " and a number, and one alone, such as 1234.5 or $1,234.5 (a '
                f"comma or space before each three digits, a point before decimals), got {problem['answer'][-40:]!r}"
            )
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
    for place, line in _numbered_lines(path):
        value = _read_object(place, line) if Path(path).suffix == ".jsonl" else {"prompt": line}
        prompt = value.get("prompt", value.get("question"))
        if not isinstance(prompt, str):
            raise ValueError(f'{place}: a prompt is an object with the text "prompt" or "question", got {line!r}')
        _check_characters(place, prompt)
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
