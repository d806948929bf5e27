"""The embedded reasoner: a small trained Llama that solves word problems step by step, so that all can be run with no
hub.

Its model card is model/README.md beside this file; examples/reasoner/ holds the script that trained it.
"""

import json
from pathlib import Path


_HERE = Path(__file__).parent
_PROBLEMS = {"test": "problems.jsonl", "long": "long_problems.jsonl"}


def reasoner_path() -> str:
    """Returns the directory of the reasoner, for `AutoModelForCausalLM.from_pretrained` and
    `AutoTokenizer.from_pretrained`.
    """
    return str(_HERE / "model")


def reasoner_problems(name: str = "test") -> list[dict]:
    """Returns problems that the reasoner has not seen in training.

    Each has a `question`, an `answer` that ends in "#### 42" (GSM8K's form), and `num_steps`.

    Args:
        name: `"test"`, 500 problems of 6 to 10 steps, or `"long"`, 20 of 36 steps, whose answers have over 300 tokens.
    """
    if name not in _PROBLEMS:
        raise ValueError(f"name must be one of {list(_PROBLEMS)}, got {name!r}")
    lines = (_HERE / _PROBLEMS[name]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
