"""States of the whole process that several threads need at once."""

import contextlib
import threading
from collections.abc import Callable, Iterator


class SharedContext:
    """A context, made by `make`, that the first block of all threads enters, and the last one leaves."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager]):
        self._make = make
        self._lock = threading.Lock()
        self._num_blocks, self._undo = 0, contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._num_blocks:
                self._undo.enter_context(self._make())
            self._num_blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_blocks -= 1
                if not self._num_blocks:
                    self._undo.close()
