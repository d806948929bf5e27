"""The parser's class: what is wrong is told in a line, with the word that was meant."""

import argparse
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from ..settings.methods import did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse's, of which the parsers of subcommands are made as well.

    Options cannot be abbreviated: each has two spellings, between which a part of it would be ambiguous, and a command
    that somebody saved is to mean the same when there are more options.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self._has_commands = False

    def add_subparsers(self, **kwargs: Any) -> Any:
        self._has_commands = True
        return super().add_subparsers(**kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        if self._has_commands and not args:  # in a script a command that is left out is an error
            self.print_help(sys.stderr)
            self.exit(2)
        self._check_options(args)
        return super().parse_known_args(args, namespace)

    def _check_options(self, args: Iterable[str]) -> None:
        """Ends with an error for an option that there is not, which comes before one that is missing."""
        for arg in args:
            is_option = re.fullmatch(r"-[^\d.\s]\S*", arg)
            if arg == "--" or (self._has_commands and not is_option):
                return
            name = arg.partition("=")[0]
            if is_option and name not in self._option_string_actions:
                self.error(f"there is no option {name}.{self._meant(name)}")

    def _meant(self, name: str) -> str:
        """Returns a question that names the option closest to `name`: one that begins so, or else one spelt alike."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        name = "--" + name.lstrip("-").replace("-", "_")
        longer = [option for option in known if option.startswith(name)]
        return did_you_mean(longer[0] if longer else name, known)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            told = f"{did_you_mean(value, action.choices)} Choose from {', '.join(action.choices)}"
            if not action.option_strings:
                self.error(f"there is no command {value!r}.{told}")
            raise argparse.ArgumentError(action, f"cannot be {value!r}.{told}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')}\n{self.prog} --help tells what it takes.\n")
