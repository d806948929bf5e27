"""The embedded reasoner: a small trained Llama that solves word problems step by step, so that all can be run with no
hub.

Its model card is model/README.md beside this file; examples/reasoner/ holds the script that trained it.
"""

import json
from pathlib import Path


_HERE = Path(__file__).parent


def reasoner_path() -> str:
    """Returns the directory of the reasoner, for `AutoModelForCausalLM.from_pretrained` and
    `AutoTokenizer.from_pretrained`.
    """
    return str(_HERE / "model")


def reasoner_problems() -> list[dict]:
    """Returns 500 problems of 6 to 10 steps that the reasoner has not seen in training.

    Each has a `question`, an `answer` that ends in "#### 42" (GSM8K's form), and `num_steps`.
    """
    lines = (_HERE / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
