"""The models that go by names of their own: where they are, and the prompts that they come with."""

from ..reasoner import reasoner_path
from ..smollm2 import smollm2_path, smollm2_prompts


_PATHS = {"reasoner": reasoner_path, "smollm2": smollm2_path}
OWN_NAMES = tuple(_PATHS)


def model_path(name: str) -> str:
    """Returns the directory of `"reasoner"` or `"smollm2"`, and any other id or path as it is.

    Raises `ImportError` if the packages that SmolLM2 comes in are missing.
    """
    return _PATHS[name]() if name in _PATHS else name


def own_prompts(name: str, chat: bool = False) -> list[tuple[str, bool]]:
    """Returns the prompts that a model comes with, each with whether it goes into the chat template; none for a model
    that is neither `"reasoner"` nor `"smollm2"`.

    Args:
        chat: whether the reasoner's go into it. Half of SmolLM2's do.

    Raises:
        `ValueError` if `chat` is asked for with SmolLM2; `ImportError` if the package of its prompts is missing.
    """
    if name == "smollm2":
        if chat:
            raise ValueError("of smollm2's own prompts half go into the chat template anyway: leave --chat out")
        return smollm2_prompts()
    if name != "reasoner":
        return []
    from .problems import long_prompts  # which imports transformers, that the names do without

    return [(prompt, chat) for prompt in long_prompts(chat)]
