"""The tests run in a process for each core, one file in one process. `pytest -n 0` has them all in this one."""

import os


if "PYTEST_XDIST_WORKER" in os.environ:
    # Each in one thread: the threads of several processes would wait for the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
