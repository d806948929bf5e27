"""What an evaluation asks: word problems with a final answer, or plain text to predict."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StopStringCriteria

from ..decode.sparse_twin import SparseTwin
from ..decode.stats import GenerationStats
from ..decode.verification import is_accepted
from ..model.accelerate_hooks import execution_device
from ..reasoner import reasoner_problems
from ..settings.config import SiriusConfig
from .problems import final_answer, load_problems, problem_prompt, read_text
from .timing import generator, synchronize


STOP_STRING = "Question:"  # without a chat template, a model goes on to a problem of its own
# The name of the embedded problems by the name of the task.
EMBEDDED_TASKS = {"reasoner": "test", "reasoner-long": "long"}


class Task(Protocol):
    """Items that can be run in several modes, one at a time.

    Attributes:
        name: for people, and for the directory of a run.
        columns: the measures of [`measures`] that only this task has, in order.
    """

    name: str
    columns: ClassVar[tuple[str, ...]]

    def __len__(self) -> int: ...

    def description(self, model: PreTrainedModel) -> dict[str, Any]:
        """Returns all that the records depend on beside the model's weights, as plain values."""

    def run(self, idx: int, model: PreTrainedModel, twin: SparseTwin | None = None, corrected: bool = True) -> dict:
        """Runs one item in a mode (as in [`generator`]), and returns its record, plain values."""

    def check(self, model: PreTrainedModel, config: SiriusConfig | None = None, corrected: bool = True) -> None:
        """Raises `ValueError` if the task cannot be run in this mode with this model."""

    def warm_up(self, model: PreTrainedModel, twin: SparseTwin | None = None, corrected: bool = True) -> None:
        """Runs the model a little, so that lazy loading is not timed."""

    def measures(self, records: list[dict]) -> dict[str, float | None]:
        """Returns the measures of one mode from its records, in the order of the items."""


class ProblemTask(Task):
    """Problems with a final answer, answered greedily.

    Args:
        problems: dicts with `question` and `answer`, the latter ending in "#### 42".
        few_shot: solved problems that come before each, as turns of the chat or in the same text.
        chat: whether the prompt is put into the tokenizer's chat template; by default, if there is one.
        max_new_tokens: of an answer.
    """

    columns = ("accuracy",)

    def __init__(
        self,
        name: str,
        problems: list[dict],
        tokenizer: PreTrainedTokenizerBase,
        few_shot: list[dict] = (),
        chat: bool | None = None,
        max_new_tokens: int = 256,
    ):
        if chat and not tokenizer.chat_template:
            raise ValueError(
                f"chat was asked for, but the {type(tokenizer).__name__} has no chat template: leave it out"
            )
        self.name, self.problems, self.tokenizer = name, problems, tokenizer
        self.few_shot, self.max_new_tokens = list(few_shot), max_new_tokens
        self._options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        self.chat = bool(tokenizer.chat_template) if chat is None else chat
        self._stops = []
        if not self.chat:
            with contextlib.suppress(ValueError):  # transformers cannot match them where a token is a whole word
                self._stops = [StopStringCriteria(tokenizer, STOP_STRING)]

    def __len__(self) -> int:
        return len(self.problems)

    def description(self, model):
        # In the ids a change of the chat template, the few-shot examples or the tokenizer shows as well.
        inputs = [self.inputs(problem["question"]) for problem in self.problems]
        generation = json.loads(model.generation_config.to_json_string(ignore_metadata=True))
        return {
            "task": self.name,
            "num_items": len(self),
            "chat": self.chat,
            "prompts": digest([{name: values.tolist() for name, values in prompt.items()} for prompt in inputs]),
            "answers": digest([final_answer(problem["answer"]) for problem in self.problems]),
            "generation": {**generation, **self._options, "stop_string": STOP_STRING if self._stops else None},
        }

    def inputs(self, question: str):
        """Returns the tokenized prompt of a question, long [1, length] each."""
        if self.chat:
            turns = [turn for shot in self.few_shot for turn in (shot["question"], shot["answer"])] + [question]
            roles = itertools.cycle(("user", "assistant"))
            messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        shots = [f"{problem_prompt(shot['question'])} {shot['answer']}\n\n" for shot in self.few_shot]
        return self.tokenizer("".join(shots) + problem_prompt(question), return_tensors="pt")

    def warm_up(self, model, twin=None, corrected=True):
        inputs = self.inputs(self.problems[0]["question"]).to(execution_device(model))
        generator(model, twin, corrected)(**inputs, max_new_tokens=8, do_sample=False)

    def run(self, idx, model, twin=None, corrected=True):
        problem = self.problems[idx]
        inputs = self.inputs(problem["question"]).to(execution_device(model))
        options = {**self._options, "stopping_criteria": list(self._stops)}
        start = time.perf_counter()
        output = generator(model, twin, corrected)(**inputs, **options)
        synchronize(execution_device(model))
        seconds = time.perf_counter() - start
        new_ids = output[0, inputs["input_ids"].shape[1] :]
        text = self.tokenizer.decode(new_ids, skip_special_tokens=True)
        answer = final_answer(text)
        return {
            "is_correct": answer is not None and answer == final_answer(problem["answer"]),
            "answer": answer,
            "text": text,
            "num_tokens": len(new_ids),
            "seconds": seconds,
            "counts": None if twin is None else twin.stats.counts(),
        }

    def measures(self, records):
        stats = _stats(records)
        names = ("aal", "acceptance_rate", "num_rolled_back", "draft_density", "effective_density")
        num_tokens, seconds = (sum(record[name] for record in records) for name in ("num_tokens", "seconds"))
        return {
            "accuracy": sum(record["is_correct"] for record in records) / len(records),
            **{name: getattr(stats, name) if stats.num_cycles or name == "draft_density" else None for name in names},
            "nodes_per_cycle": stats.num_nodes_verified / stats.num_cycles if stats.num_cycles else None,
            "ms_per_token": 1000 * seconds / num_tokens if num_tokens else None,
        }


class TextTask(Task):
    """Windows of plain text. The first half of each is the prompt, from which the twin chooses its neurons. Both models
    read the second half, and the next tokens that they predict are compared.

    Measures: `perplexity`, exp of the mean negative log-likelihood of the text's tokens; `agreement`, the share of
    places where the draft's argmax is the full model's; `acceptance`, the share where the acceptance rule keeps it.

    Args:
        texts: each is cut into windows; a rest shorter than a window is left out.
        window: tokens, at least 4.
        max_windows: how many windows to take at most.
    """

    columns = ("perplexity", "agreement", "acceptance")

    def __init__(
        self,
        name: str,
        texts: list[str],
        tokenizer: PreTrainedTokenizerBase,
        window: int = 512,
        max_windows: int | None = None,
    ):
        if window < 4:
            raise ValueError(f"a window must have at least 4 tokens, got {window}")
        self.name, self.window = name, window
        self.windows: list[list[int]] = []
        # Each window begins with BOS, as a text does, if the tokenizer writes one.
        empty = tokenizer("")["input_ids"]
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id in empty else []
        size = window - len(start)
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            self.windows += [start + ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        self.windows = self.windows[:max_windows]
        if not self.windows:
            raise ValueError(
                f"{name} has no text of {window} tokens, which is one window: pass more text, or a smaller window"
            )

    def __len__(self) -> int:
        return len(self.windows)

    def description(self, model):
        return {"task": self.name, "num_items": len(self), "windows": digest(self.windows), "window": self.window}

    def check(self, model, config=None, corrected=True):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and self.window > limit:
            raise ValueError(
                f"a window of {self.window} tokens is longer than the {limit} positions of the "
                f"{type(model).__name__}: pass a smaller window"
            )
        if config is not None and config.tree_width > 1:
            raise ValueError(
                f"plain text is read along one path, but tree_width={config.tree_width} was given: use tree_width=1"
            )
        if config is not None and corrected:
            raise ValueError("plain text is read, and not corrected: run its draft alone")

    @torch.no_grad()
    def run(self, idx, model, twin=None, corrected=True):
        ids = torch.tensor([self.windows[idx]], device=execution_device(model))
        half = self.window // 2
        dense = model(ids[:, :-1], use_cache=False).logits[0, half - 1 :].float()
        if twin is None:
            return _record(dense, ids[0, half:])
        with twin.new_call() as call:
            with call.draft.observing(None):
                outputs = model(ids[:, :half], use_cache=True, return_dict=True)
            call.draft.select()
            first = outputs.logits[0, -1:]  # the draft's as well: the full model reads the prompt
            with call.draft.drafting():
                outputs = twin(ids[:, half:-1], past_key_values=outputs.past_key_values, return_dict=True)
        logits = outputs.logits[0].float()
        dense, drafted_ids, config = dense[1:], logits.argmax(dim=-1), twin.sirius_config
        return {
            **_record(torch.cat([first.float(), logits]), ids[0, half:]),
            "num_compared": len(drafted_ids),
            "num_agreeing": int((drafted_ids == dense.argmax(dim=-1)).sum()),
            "num_accepted": int(is_accepted(drafted_ids, dense, config.threshold, config.temperature).sum()),
            "counts": twin.stats.counts(),
        }

    def measures(self, records):
        num_tokens = sum(record["num_tokens"] for record in records)
        num_compared = sum(record.get("num_compared", 0) for record in records)

        def share(name: str) -> float | None:
            return sum(record[name] for record in records) / num_compared if num_compared else None

        return {
            "perplexity": math.exp(sum(record["loss"] for record in records) / num_tokens),
            "agreement": share("num_agreeing"),
            "acceptance": share("num_accepted"),
            "draft_density": _stats(records).draft_density,
        }


def _record(logits: torch.Tensor, targets: torch.Tensor) -> dict:
    loss = torch.nn.functional.cross_entropy(logits.double(), targets.to(logits.device), reduction="sum")
    return {"num_tokens": len(targets), "loss": loss.item(), "counts": None}


def load_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    few_shot: str | os.PathLike | None = None,
    num_items: int | None = None,
    **options: Any,
) -> Task:
    """Returns the task that a user names: `"reasoner"` or `"reasoner-long"` (the embedded problems), a JSONL file of
    problems, or a file of plain text.

    Args:
        few_shot: a JSONL file of solved problems to put before each.
        num_items: how many problems or windows to take at most.
        options: those of [`ProblemTask`] (`chat`, `max_new_tokens`) or [`TextTask`] (`window`).

    Raises:
        `ValueError` for a line that is no problem, with its number, or an option of the other kind of task; `OSError`
        for a file that cannot be read.
    """
    options = {key: value for key, value in options.items() if value is not None}
    path = Path(name)
    is_embedded = name in EMBEDDED_TASKS
    if not is_embedded and not path.is_file():
        raise FileNotFoundError(
            f"there is no task {name!r}: pass one of {list(EMBEDDED_TASKS)}, or a file (.jsonl or text)"
        )
    is_text = not is_embedded and path.suffix not in (".jsonl", ".json")
    allowed = ("window",) if is_text else ("chat", "max_new_tokens")
    unknown = sorted(set(options) - set(allowed)) + (["few_shot"] if is_text and few_shot else [])
    if unknown:
        kind = "plain text" if is_text else "problems"
        raise ValueError(f"{name} is a task of {kind}, for which {', '.join(unknown)} means nothing: leave it out")
    if is_text:
        return TextTask(path.name, [read_text(path)], tokenizer, max_windows=num_items, **options)
    problems = reasoner_problems(EMBEDDED_TASKS[name]) if is_embedded else load_problems(path)
    shots = load_problems(few_shot) if few_shot else []
    return ProblemTask(Path(name).name, problems[:num_items], tokenizer, shots, **options)


def _stats(records: list[dict]) -> GenerationStats:
    stats = GenerationStats(kernel_size=0)  # the measures do not depend on it
    for record in records:
        if record["counts"] is not None:
            stats.add_counts(record["counts"])
    return stats


def digest(values: Any) -> str:
    """Returns a name for plain values, which others do not share."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
