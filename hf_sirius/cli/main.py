"""The command line, `hf-sirius`. All else is imported within `main`, where Ctrl-C is expected; torch and transformers,
which take seconds, when a command runs.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


def main(argv: list[str] | None = None, prog: str = "hf-sirius") -> int:
    """Runs one command and returns its exit status. An error of the user's is printed in one line.

    Args:
        argv: the words of the command line, by default the process's own.
        prog: what they were given to, for help and errors.
    """
    args = None
    try:
        with _interruptible(prog):
            from .arguments import make_parser
            from .options import check

            args = make_parser(prog).parse_args(argv)
            check(args)
            commands = importlib.import_module("hf_sirius.cli.commands")
        getattr(commands, args.run)(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python would tell of it as it ends
        return 141  # that of a process which SIGPIPE ended
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args is None or args.traceback:
            raise
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _interruptible(prog: str) -> Iterator[None]:
    """Within it Ctrl-C ends the process at once: Python drops an interrupt, or prints its traceback, where it comes in
    the middle of an import's own bookkeeping.
    """

    def leave(*_: Any) -> None:
        os.write(2, f"\n{prog}: interrupted\n".encode())
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()  # which alone sees signals
    if not is_main or before is not signal.default_int_handler:  # such as of a shell's job in the background
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
