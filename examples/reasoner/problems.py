"""Multi-step arithmetic word problems in GSM8K's form, with a chain of thought for an answer.

    python examples/reasoner/problems.py --split test --num_problems 500 --min_steps 6 --max_steps 10 > problems.jsonl

writes JSON lines of `question`, `answer` (ending in "#### 42") and `num_steps`. A step is one equation of the answer.
The split is a property of the question itself (a hash of its text), so no training problem is ever a test problem,
whatever the seeds.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator


MAX_TOTAL = 99
TEST_SHARE = 16  # one question in this many belongs to the test split

SHE = ["Ann", "Cara", "Dora", "Emma", "Fay", "Gina", "Hana", "Ivy", "Julia", "Kim", "Lena", "Mia", "Nora", "Olga"]
HE = ["Ben", "Carl", "Dan", "Erik", "Finn", "Gus", "Hugo", "Ivan", "Jack", "Karl", "Leo", "Max", "Noah", "Otto"]
ITEMS = "apples pears plums nuts coins cards stamps shells stones books pens balls rings eggs".split()  # noqa: SIM905
CONTAINERS = ["bags", "boxes", "baskets", "packs"]

GAINS = ["{S} buys {k} more.", "{S} finds {k} more.", "{S} gets {k} from {other}.", "{other} gives {o} {k} {item}."]
LOSSES = ["{S} gives {k} to {other}.", "{S} loses {k} of them.", "{S} sells {k} of them.", "{other} takes {k} of them."]
DOUBLES = ["Then {s} doubles them.", "{other} gives {o} as many as {s} has."]
HALVES = ["{S} gives half of them to {other}.", "{S} loses half of them."]
GROUP_GAINS = ["{S} buys {k} {container} of {m} {item} each."]
GROUP_LOSSES = ["{S} gives {m} {item} to each of {k} friends."]
DISTRACTORS = ["{other} has {d} {other_item}.", "{S} also has {d} {other_item}."]


def split_of(question: str) -> str:
    """Returns "test" or "train": the side of the split to which this text belongs."""
    return "test" if int(hashlib.sha256(question.encode()).hexdigest(), 16) % TEST_SHARE == 0 else "train"


def _next_event(rng: random.Random, total: int, steps_left: int):
    """Draws an event that keeps the total in 2 .. MAX_TOTAL: (templates, numbers for them, equations, new total)."""
    while True:
        kind = rng.choices(["gain", "loss", "double", "half", "group_gain", "group_loss"], [5, 5, 1, 2, 2, 2])[0]
        k = rng.randint(2, 19) if kind in ("gain", "loss") else rng.randint(2, 5)
        m = rng.randint(2, 9)
        equations = []
        if kind == "gain":
            templates, new = GAINS, total + k
            equations = [f"{total} + {k} = {new}"]
        elif kind == "loss":
            templates, new = LOSSES, total - k
            equations = [f"{total} - {k} = {new}"]
        elif kind == "double":
            templates, new = DOUBLES, total * 2
            equations = [f"{total} * 2 = {new}"]
        elif kind == "half":
            if total % 2:
                continue
            templates, new = HALVES, total // 2
            equations = [f"{total} / 2 = {new}"]
        else:
            sign = 1 if kind == "group_gain" else -1
            templates, new = (GROUP_GAINS if sign > 0 else GROUP_LOSSES), total + sign * k * m
            equations = [f"{k} * {m} = {k * m}", f"{total} {'+' if sign > 0 else '-'} {k * m} = {new}"]
        if 2 <= new <= MAX_TOTAL and len(equations) <= steps_left:
            return templates, {"k": k, "m": m}, equations, new


def make_problem(rng: random.Random, num_steps: int) -> dict:
    """Draws one problem whose answer has exactly `num_steps` equations."""
    female = rng.random() < 0.5
    name = rng.choice(SHE if female else HE)
    item, other_item = rng.sample(ITEMS, 2)
    words = {"S": "She" if female else "He", "s": "she" if female else "he", "o": "her" if female else "him"}
    total = rng.randint(3, 60)
    sentences, equations = [f"{name} has {total} {item}."], []
    while len(equations) < num_steps:
        templates, numbers, new_equations, total = _next_event(rng, total, num_steps - len(equations))
        other = rng.choice([n for n in SHE + HE if n != name])
        sentences.append(
            rng.choice(templates).format(**words, **numbers, other=other, item=item, container=rng.choice(CONTAINERS))
        )
        equations += new_equations
    if rng.random() < 0.25:
        other = rng.choice([n for n in SHE + HE if n != name])
        distractor = rng.choice(DISTRACTORS).format(**words, other=other, d=rng.randint(2, 99), other_item=other_item)
        sentences.insert(rng.randint(1, len(sentences)), distractor)
    question = " ".join(sentences) + f" How many {item} does {name} have now?"
    return {
        "question": question,
        "answer": " ".join(f"{equation}." for equation in equations) + f" #### {total}",
        "num_steps": num_steps,
    }


def problems(split: str, seed: int, min_steps: int, max_steps: int) -> Iterator[dict]:
    """Yields problems of one split without end; the number of steps is uniform in min_steps .. max_steps."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        problem = make_problem(rng, rng.randint(min_steps, max_steps))
        if split_of(problem["question"]) == split:
            yield problem


def vocabulary() -> list[str]:
    """Returns every word and mark that a problem, its prompt or its answer can contain, in a fixed order."""
    templates = GAINS + LOSSES + DOUBLES + HALVES + GROUP_GAINS + GROUP_LOSSES + DISTRACTORS
    text = " ".join(templates) + " She He she he her him How many does have now? has Question: Answer:"
    words = {word.strip(".?:") for word in text.split() if "{" not in word}
    return sorted(words | set(SHE + HE + ITEMS + CONTAINERS)) + list("0123456789") + list("+-*/=.?:") + ["####", "\n"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=["train", "test"], default="test")
    parser.add_argument("--num_problems", type=int, default=500)
    parser.add_argument("--min_steps", type=int, default=6)
    parser.add_argument("--max_steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    source = problems(args.split, args.seed, args.min_steps, args.max_steps)
    for _ in range(args.num_problems):
        sys.stdout.write(json.dumps(next(source)) + "\n")


if __name__ == "__main__":
    main()
