"""Sweeps: which modes a grid makes, and what is drawn of them."""

import json
import sys

import pytest

from hf_sirius import SiriusConfig
from hf_sirius.cli.main import main
from hf_sirius.study.sweep import plot_sweep, sweep_modes


BASE = SiriusConfig(method="griffin", kernel_size=8)


def test_a_grid_gives_every_combination_and_each_draft_alone_once():
    grid = {"threshold": [0.0, 0.1, 1.0], "method": ["griffin", "cats"], "density": [0.5, 0.3], "tree_width": []}
    dense, *others = sweep_modes(BASE, grid)
    assert dense.config is None
    alone = [mode for mode in others if not mode.corrected]
    assert others[:4] == alone
    assert {(mode.config.method, mode.config.density) for mode in alone} == {
        (method, density) for method in grid["method"] for density in grid["density"]
    }
    corrected = [mode.config for mode in others if mode.corrected]
    assert len(corrected) == 12 == len(set(corrected))
    assert {config.threshold for config in corrected} == {0.0, 0.1, 1.0}
    assert all(config.kernel_size == 8 and config.tree_width == 1 for config in corrected)
    assert len({mode.key for mode in (dense, *others)}) == len({mode.name for mode in (dense, *others)}) == 17


def test_what_varies_is_named():
    modes = sweep_modes(BASE, {"threshold": [0.1, 1.0], "kernel_size": [4], "tree_width": [1, 4]})
    names = [mode.name for mode in modes]
    assert names[:3] == ["dense", "griffin 0.5 alone", "griffin 0.5, threshold 0.1, width 1"]
    assert {mode.config.kernel_size for mode in modes[2:]} == {4}


def test_each_method_takes_the_fields_that_it_knows():
    config = SiriusConfig(method="griffin", draft_dtype="bfloat16", reselect_every=2)
    modes = sweep_modes(config, {"method": ["griffin", "cats"]})
    assert {(mode.config.method, mode.config.draft_dtype, mode.config.reselect_every) for mode in modes[1:]} == {
        ("griffin", "bfloat16", 2),
        ("cats", "bfloat16", None),
    }
    topk = sweep_modes(SiriusConfig(selection="topk"), {"method": ["griffin", "cats"]})
    assert {mode.config.selection for mode in topk[1:] if mode.config.method == "cats"} == {"topk"}


def test_a_value_that_is_not_allowed_is_refused():
    with pytest.raises(ValueError, match="threshold must be in"):
        sweep_modes(BASE, {"threshold": [0.1, 1.5]})


@pytest.fixture
def swept(tmp_path, capsys):
    """(results, what was printed, directory) of a small sweep on the embedded reasoner."""
    command = ["sweep", "--num_items", "2", "--densities", "0.3", "--thresholds", "0", "1", "--max_new_tokens", "120"]
    assert main([*command, "--output_dir", str(tmp_path)]) == 0
    return json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out, tmp_path


def test_sweep_shows_what_sparsity_loses_and_correction_wins_back(swept):
    results, printed, directory = swept
    accuracy = {row["way"]: row["accuracy"] for row in results["rows"]}
    assert accuracy["griffin 0.3 alone"] == accuracy["griffin 0.3, threshold 0.0"] == 0
    assert accuracy["griffin 0.3, threshold 1.0"] == accuracy["dense"] == 1
    assert "griffin 0.3 alone" in printed
    assert (directory / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_plots_have_every_series(swept):
    results, _, directory = swept
    plot_sweep(results, directory / "sweep.svg")
    drawn = (directory / "sweep.svg").read_text()
    # matplotlib draws text as paths, and says in a comment what it is.
    for text in ("griffin 0.3", "griffin 0.3, alone", "dense", "threshold", "AAL (tokens per cycle)"):
        assert f"<!-- {text} -->" in drawn, text


@pytest.mark.slow
def test_a_measure_without_data_is_left_out_of_the_plots(swept):
    results, _, directory = swept
    for row in results["rows"]:
        row["aal"] = row["effective_density"] = row["draft_density"] = None
    plot_sweep(results, directory / "empty.png")
    assert (directory / "empty.png").stat().st_size > 0


def test_matplotlib_missing_is_told_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["sweep", "--output_dir", str(tmp_path / "run")]) == 2
    assert "pip install hf_sirius[plot]" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_bad_places_are_told_before_anything_runs(tmp_path, capsys):
    assert main(["sweep", "--plot", str(tmp_path / "no" / "such.png")]) == 2
    assert "does not exist: make it first" in capsys.readouterr().err
    assert main(["sweep", "--plot", str(tmp_path / "plot.foo")]) == 2
    assert "a plot must end in one of" in capsys.readouterr().err
    assert main(["sweep", "--plot", str(tmp_path / "plot.png"), "--no_plots"]) == 2
    assert "leave one out" in capsys.readouterr().err
    text = tmp_path / "t.txt"
    text.write_text("Ann has 17 apples. " * 200)
    assert main(["sweep", "--task", str(text), "--window", "16", "--output_dir", str(tmp_path / "run")]) == 2
    assert "wants problems with answers" in capsys.readouterr().err and not (tmp_path / "run").exists()
