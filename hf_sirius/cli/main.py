"""The command line, `hf-sirius`. All else is imported within `main`, where Ctrl-C is expected; torch and transformers,
which take seconds, when a command runs.
"""

import contextlib
import importlib
import os
import select
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
        if sys.stdout is not None:
            sys.stdout.flush()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args is None or args.traceback:
            raise
        if isinstance(error, BrokenPipeError) and not _is_read():
            return 141  # that of a process which SIGPIPE ended
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _is_read() -> bool:
    """Whether somebody reads the standard output. Where nobody does any more, what is left of it goes nowhere."""
    try:
        output, poll = sys.stdout.fileno(), select.poll()
    except (AttributeError, OSError):  # it is captured, or this is Windows, where the error is another one
        return True
    poll.register(output, 0)
    if not poll.poll(0):  # which would tell of a closed pipe
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # else Python would tell of it as it ends
    return False


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
