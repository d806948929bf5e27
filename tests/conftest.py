"""The whole suite runs on all cores."""

import os

import pytest


_MOST_WORKERS = 4  # each holds models of its own


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Hands the whole suite to workers of pytest-xdist, where it is installed and nothing else is asked for."""
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not is_whole or getattr(config.option, "numprocesses", 0) is not None or config.getvalue("usepdb"):
        return
    num_workers = min(os.cpu_count() or 1, _MOST_WORKERS)
    config.option.numprocesses, config.option.dist = num_workers, "worksteal"
    # Threads of each would wait for the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_workers)))
