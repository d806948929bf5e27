"""Accuracy on word problems: of the dense model, of its sparse twin alone, and of the two together."""

import dataclasses
import time
from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .twin import SparseTwin


@dataclasses.dataclass
class Evaluation:
    """Counts over a set of problems.

    Attributes:
        num_problems, num_correct: problems, and those whose final answer was right.
        num_tokens: tokens generated.
        seconds: time spent in `generate`, prefill included.
    """

    num_problems: int = 0
    num_correct: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def accuracy(self) -> float | None:
        return self.num_correct / self.num_problems if self.num_problems else None

    @property
    def ms_per_token(self) -> float | None:
        return 1000 * self.seconds / self.num_tokens if self.num_tokens else None


def problem_prompt(question: str) -> str:
    """Returns the prompt of a problem, the one of lm-evaluation-harness' GSM8K task."""
    return f"Question: {question}\nAnswer:"


def final_answer(text: str) -> str | None:
    """Returns what follows the first "####", without separators of thousands, or `None` where there is no such mark."""
    _, mark, rest = text.partition("####")
    words = rest.split()
    return words[0].replace(",", "").rstrip(".") if mark and words else None


def generator(
    model: PreTrainedModel, twin: SparseTwin | None = None, alone: bool = False
) -> Callable[..., torch.Tensor]:
    """Returns the `generate` of one way to run a model: dense, corrected by it (`twin`), or the twin `alone`."""
    if twin is None:
        return model.generate
    if alone:
        return twin.generate
    return lambda **inputs: model.generate(assistant_model=twin, **inputs)


def evaluate(
    generate: Callable[..., torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    problems: Iterable[dict],
    device: torch.device | str = "cpu",
    max_new_tokens: int = 256,
) -> Evaluation:
    """Answers problems greedily, one at a time, and compares the final answers.

    Args:
        generate: takes what stock `generate` takes; see [`generator`].
        problems: dicts with `question` and `answer`, the latter ending in "#### 42".
    """
    result = Evaluation()
    for problem in problems:
        inputs = tokenizer(problem_prompt(problem["question"]), return_tensors="pt").to(device)
        start = time.perf_counter()
        output = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        result.seconds += time.perf_counter() - start
        new_ids = output[0, inputs["input_ids"].shape[1] :]
        answer = final_answer(tokenizer.decode(new_ids, skip_special_tokens=True))
        result.num_problems += 1
        result.num_correct += answer is not None and answer == final_answer(problem["answer"])
        result.num_tokens += len(new_ids)
    return result
