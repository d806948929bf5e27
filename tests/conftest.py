"""The tests run in a process for each of up to four cores, a file in one. `pytest -n 0` has all of them in this one."""

import os


if "PYTEST_XDIST_WORKER" in os.environ:
    # Each in one thread: the threads of several processes would wait for the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
