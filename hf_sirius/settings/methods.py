"""The table of the sparsity methods: a row each, and a file that is loaded when the method is first used."""

import dataclasses
import difflib
import importlib
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """What must be known of a method before its file is loaded."""

    path: str  # its class, `"module:Class"`, a [`SparsityMethod`]
    fields: tuple[str, ...] = ()  # fields of [`SiriusConfig`] that not every method takes
    saves_time: bool = False  # whether its drafts are faster than the model by themselves, without a kernel


# Those that save time come first.
METHODS = {
    "griffin": MethodRow("hf_sirius.sparsity.griffin:Griffin", fields=("reselect_every",), saves_time=True),
    "cats": MethodRow("hf_sirius.sparsity.cats:Cats", fields=("selection", "calibration")),
    "teal": MethodRow("hf_sirius.sparsity.teal:Teal", fields=("weighting", "calibration", "budget")),
    "experts": MethodRow("hf_sirius.sparsity.experts:Experts"),  # of mixtures of experts
}
_WHOLE = "hf_sirius.sparsity.whole:Whole"


def check_method_name(name: str) -> None:
    """Raises `TypeError` or `ValueError` unless a method of this name exists."""
    if not isinstance(name, str):
        raise TypeError(f"method must be one of {list(METHODS)}, got {name!r}")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}.{did_you_mean(name, METHODS)} The methods are {list(METHODS)}.")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Returns a question that names the known word closest to what was given, with a space before it, or ""."""
    close = difflib.get_close_matches(given.lower(), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def method_class(name: str) -> type:
    """Returns the class of a method, a [`SparsityMethod`]."""
    check_method_name(name)
    return _load(METHODS[name].path)


def method_of(config: Any) -> type:
    """Returns the class of a [`SiriusConfig`]'s method. At a density of 1 all of them are one."""
    return method_class(config.method) if config.density < 1 else _load(_WHOLE)


def _load(path: str) -> type:
    module_name, class_name = path.split(":")
    return getattr(importlib.import_module(module_name), class_name)


def owners_of(field: str) -> list[str]:
    """Returns the methods that alone take a field of the config, none where all do."""
    return [name for name, row in METHODS.items() if field in row.fields]
