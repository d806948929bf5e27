"""The comparison of drafts: what it measures of each, and what it shows."""

import json

import pytest

from hf_sirius import reasoner_problems
from hf_sirius.cli import main as cli
from hf_sirius.study import drafts
from hf_sirius.study.problems import problem_prompt


@pytest.fixture(autouse=True)
def a_few(monkeypatch):
    settings = (
        {"density": 1.0, "draft_dtype": "int8"},
        {"density": 1.0, "draft_dtype": "int8", "draft_head": "shortlist"},
        {"method": "griffin", "density": 0.5, "draft_dtype": None},
        {"method": "teal", "density": 0.5, "weighting": "column"},
        {"method": "griffin", "density": 0.5, "draft_dtype": "nf4"},
    )
    monkeypatch.setattr(drafts, "SETTINGS", settings)
    make_sparse = drafts.make_sparse

    def without_nf4(model, **fields):
        if fields.get("draft_dtype") == "nf4":
            raise ImportError("needs bitsandbytes: pip install hf_sirius[bnb]")
        return make_sparse(model, **fields)

    monkeypatch.setattr(drafts, "make_sparse", without_nf4)


def test_each_draft_has_its_figures_and_what_does_not_run_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "drafts.json"
    options = ["--num_prompts", "1", "--max_new_tokens", "24", "--kernel_size", "4", "--json", str(file)]
    assert cli.main(["bench", "drafts", *options]) == 0
    printed, figures = capsys.readouterr().out, json.loads(file.read_text())
    whole, short, griffin, teal = figures["rows"]
    assert short["agreement"] > 0.9 and short["bytes"] != whole["bytes"]
    assert (
        whole["agreement"] > 0.9 and whole["aal"] == 4.0 and all(row["num_identical"] == 1 for row in figures["rows"])
    )
    # A byte and a sixteenth of scales each; float32 halved in the MLPs alone; half of all but the head.
    assert whole["bytes"] == pytest.approx(0.53, abs=0.01)
    assert 1.0 < griffin["bytes"] < 2.0 and 1.0 <= teal["bytes"] < griffin["bytes"]
    assert [row["draft_dtype"] for row in figures["left_out"]] == ["nf4"]
    told = " ".join(printed.split())
    shown = ("whole int8", "whole, shortlist int8", "griffin 0.5", "teal 0.5, by column")
    assert all(name in told for name in shown) and "…" not in printed
    assert "Left out: griffin 0.5 nf4: needs bitsandbytes: pip install hf_sirius[bnb]" in told


def test_a_prompt_behind_which_there_is_nothing_to_read_is_passed_over(monkeypatch):
    monkeypatch.setattr(drafts, "SETTINGS", drafts.SETTINGS[:1])
    problem = reasoner_problems()[0]
    open_, solved = problem_prompt(problem["question"]), f"{problem_prompt(problem['question'])} {problem['answer']}"
    rows = []
    for texts in ([open_], [solved, open_]):
        monkeypatch.setattr(drafts, "own_prompts", lambda model, texts=texts: [(text, False) for text in texts])
        figures = drafts.compare_drafts(max_new_tokens=12, kernel_size=4)
        assert figures["num_prompts"] == 1
        rows.append({**figures["rows"][0], "ratio": None})
    assert rows[0] == rows[1]
    monkeypatch.setattr(drafts, "own_prompts", lambda model: [(solved, False)])
    with pytest.raises(ValueError, match=r"every answer \(1 of num_prompts=6\) is a single token.*at least 2, got 12"):
        drafts.compare_drafts(max_new_tokens=12)
