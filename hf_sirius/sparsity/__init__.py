"""The sparsity methods, one file each. This table loads a method's file only when it is used."""

import difflib
import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .base import SparsityMethod

METHODS = {
    "cats": "cats:Cats",
    "griffin": "griffin:Griffin",
}


def check_method_name(name: str) -> None:
    """Raises `TypeError` or `ValueError` unless a method of this name exists."""
    if not isinstance(name, str):
        raise TypeError(f"method must be one of {list(METHODS)}, got {name!r}")
    if name not in METHODS:
        close = difflib.get_close_matches(name.lower(), METHODS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown method {name!r}.{hint} The methods are {list(METHODS)}.")


def method_class(name: str) -> type["SparsityMethod"]:
    """Returns the class of a method."""
    check_method_name(name)
    module_name, class_name = METHODS[name].split(":")
    return getattr(importlib.import_module(f".{module_name}", __name__), class_name)
