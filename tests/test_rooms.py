"""The rooms: imports run one way between them, there is no ring, and `docs/design.md` leads to every file."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import hf_sirius


PACKAGE = Path(hf_sirius.__file__).parent
DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
# A room imports from itself and from those before it.
ROOMS = (
    "reasoner",
    "smollm2",
    "model",
    "settings",
    "kernels",
    "weights",
    "sparsity",
    "draft",
    "decode",
    "study",
    "cli",
)
DOORS = ("__init__", "__main__", "harness", "report")  # which users import by name, and no room does
MAX_LINES = 400


def module_names() -> dict[str, Path]:
    """Returns {dotted name within the package: file}; a package goes by its own name, the root by `__init__`."""
    names = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = file
    return names


MODULES = module_names()


def imports_of(name: str) -> set[str]:
    """Returns the package's modules that a file imports anywhere: in functions and for type checkers as well."""
    is_package = MODULES[name].name == "__init__.py"
    here = ["hf_sirius", *([] if name == "__init__" else name.split("."))]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + is_package] if node.level and name != "__init__" else []
            base = ["hf_sirius"] if node.level and name == "__init__" else base
            source = [*base, *([node.module] if node.module else [])]
            targets = [".".join([*source, alias.name]) for alias in node.names]
        else:
            continue
        for target in targets:
            if not target.startswith("hf_sirius"):
                continue
            inner = target.removeprefix("hf_sirius").lstrip(".")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            if inner or target != "hf_sirius.__version__":
                found.add(inner or "__init__")
    return found - {name}


IMPORTS = {name: imports_of(name) for name in MODULES}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_the_reader_of_imports_sees_them():
    assert {"decode.bond", "draft.twin", "settings.config"} <= IMPORTS["decode.attach"]
    assert "study.demo" in IMPORTS["cli.commands"], "within a function"
    assert "decode.attach" in IMPORTS["__init__"], "for type checkers"


def test_every_module_lies_in_a_room_or_is_a_door():
    assert {room(name) for name in MODULES} == {*ROOMS, *DOORS}


def test_imports_run_one_way_between_rooms():
    order = {**{name: i for i, name in enumerate(ROOMS)}, **dict.fromkeys(DOORS, len(ROOMS))}
    astray = [
        (name, other)
        for name, others in IMPORTS.items()
        for other in others
        if order[room(other)] > order[room(name)] or (room(other) in DOORS and room(name) not in DOORS)
    ]
    assert not astray


def test_no_imports_make_a_ring():
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError


def test_no_file_is_long():
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in MODULES.items()}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_the_design_leads_to_every_file_and_to_no_other():
    text = DESIGN.read_text(encoding="utf-8")
    for name in ROOMS:
        assert f"`{name}/`" in text, f"docs/design.md does not name the room {name}"
    told = set(re.findall(r"`([a-z0-9_]+(?:/[a-z0-9_]+)*\.py)`", text)) - {"tests/test_rooms.py"}
    files = {file.relative_to(PACKAGE).as_posix() for file in MODULES.values() if file.name != "__init__.py"}
    assert told == files
