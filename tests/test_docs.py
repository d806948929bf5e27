"""The pages: what they link to is there, their Python runs, and the public names stand on one."""

import inspect
import itertools
import json
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from tiny import slow_unless

import hf_sirius


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *PAGES]
MAX_README_BYTES = 12 * 1024


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def tokens_of(text: str):
    """Yields the tokens of Markdown, those within a line as well."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def links_of(text: str) -> list[str]:
    """Returns what a text links to or shows, within these files alone."""
    found = [token.attrGet("href") or token.attrGet("src") for token in tokens_of(text)]
    return [target for target in found if target and not re.match(r"[a-z]+:", target)]


def anchors_of(text: str) -> set[str]:
    """Returns the anchors of a text: those of its headings, and the names of the API that it shows."""
    tokens = list(tokens_of(text))
    headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE))


def python_of(text: str) -> str:
    """Returns the blocks of Python, each at the lines where it stands."""
    lines = [""] * len(text.splitlines())
    for token in tokens_of(text):
        if token.type == "fence" and token.info == "python":
            start = token.map[0] + 1
            block = token.content.splitlines()
            lines[start : start + len(block)] = block
    return "\n".join(lines)


def run(source: str, name: str, values: dict) -> dict:
    values = {**values, "__name__": name}
    exec(compile(source, name, "exec"), values)
    return values


def test_links_and_anchors_are_seen():
    text = "# A `b`: c\n[x](y.md#z) ![i](j.png) [w](https://w)\n\n| a |\n|---|\n| [t](u) |\n\n::: n.m\n\n    [n](n)"
    assert links_of(text) == ["y.md#z", "j.png", "u"]
    assert anchors_of(text) == {"a-b-c", "n.m"}
    assert python_of("a\n\n```python\nx = 1\n```\n```bash\ny\n```") == "\n\n\nx = 1\n\n\n\n"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_leads_to_something(document):
    for target in links_of(document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{name_of(document)} links to {target}"
        if anchor:
            assert anchor in anchors_of(file.read_text(encoding="utf-8")), f"{name_of(document)} links to {target}"


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= MAX_README_BYTES


@pytest.mark.parametrize("name", sorted(set(hf_sirius.__all__) - {"__version__"}))
def test_every_public_name_is_told_of(name):
    value = getattr(hf_sirius, name)
    assert inspect.getdoc(value) and value.__doc__, "it needs a docstring of its own"
    assert f"hf_sirius.{name}" in anchors_of((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))


def test_the_citation_has_the_version():
    assert f"version: {hf_sirius.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def first_output():
    """The values that the front page leaves to the others: the model, its tokenizer, a problem, and so on."""
    return run(python_of((ROOT / "docs" / "index.md").read_text(encoding="utf-8")), "docs/index.md", {})


def pages_with_python() -> list:
    pages = [page for page in PAGES if python_of(page.read_text(encoding="utf-8")).strip()]
    return [pytest.param(page, id=name_of(page), marks=slow_unless(page.stem != "compile")) for page in pages]


@pytest.mark.parametrize("page", pages_with_python())
def test_the_python_of_a_page_runs(page, first_output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(python_of(page.read_text(encoding="utf-8")), name_of(page), first_output)


def test_the_python_of_the_readme_prints_what_it_says(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    run(python_of(text[text.index("\n## ") :]), "README.md", {})  # what comes before shows the idea, on any model
    printed = capsys.readouterr().out
    for name, answer in (("dense", 15), ("sparse alone", 5), ("Sirius", 15)):
        assert re.search(rf"^{name}: .*#### {answer}$", printed, flags=re.MULTILINE), printed


@pytest.mark.slow
def test_the_notebook_runs(capsys):
    notebook = json.loads((ROOT / "examples" / "first_hour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "save it without outputs"
    values: dict = {}
    for number, cell in enumerate(cells, 1):
        values = run("".join(cell["source"]), f"first_hour.ipynb, cell {number}", values)
        assert capsys.readouterr().out, f"cell {number} shows nothing"
    assert values["num_right"]["Sirius"] == values["num_right"]["dense"] > values["num_right"]["sparse alone"]
    assert {"kept", "own", "rolled_back"} == {token.fate for token in values["trace"].tokens}
