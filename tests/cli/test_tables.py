"""Tables: whole where they go to a pipe, and no wider than a terminal."""

import io
import sys

import pytest

from hf_sirius.cli.tables import show_drafts, show_results
from hf_sirius.settings.config import SiriusConfig
from hf_sirius.study.demo import demo_modes


MEASURES = {"accuracy": 0.5, "aal": 14.8, "acceptance_rate": 0.9, "num_rolled_back": 3260, "draft_density": 0.5,
            "effective_density": 0.7, "ms_per_token": 1234.5}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def results(ways: list[str]) -> dict:
    rows = [{"way": way, "config": {"tree_width": 1}, **MEASURES} for way in ways]
    return {"model": "model [of 4 bits]", "dtype": "torch.float32", "num_items": 2, "task": "t" * 100, "rows": rows}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_in_a_pipe_each_row_is_a_line(capsys):
    way = "griffin 0.5, n 16, threshold 0.05, width 4, and whatever else may vary in a sweep of many settings"
    show_results(results([way]), ("accuracy",))
    *_, row = capsys.readouterr().out.splitlines()
    assert row.split() == [*way.split(), "0.500", "14.80", "0.900", "3260", "0.500", "0.700", "1234.5"]


def test_the_demos_table_fits_into_80_columns_of_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("TERM", "dumb")  # no colours
    ways = [mode.name for mode in demo_modes(SiriusConfig())]
    show_results(results(ways), ("accuracy",))
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in terminal.getvalue()
    assert [line[: len(way)] for way, line in zip(ways, lines[-len(ways) :], strict=True)] == ways
    assert all(line.endswith("1234.5") for line in lines[-len(ways) :])


def test_drafts_without_a_whole_cycle_have_no_aal(capsys):
    row = {"method": "griffin", "density": 0.5, "agreement": 1.0, "aal": None, "bytes": 0.5, "ratio": 1.0}
    figures = {"rows": [row], "left_out": [], "model": "m", "dtype": "float32", "kernel_size": 8, "num_prompts": 1}
    show_drafts(figures)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["griffin", "0.5", "1.000", "0.50", "1.000"]
