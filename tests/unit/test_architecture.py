"""The rooms of the package and their floors: what may import what.

A room is a folder of ``tokenseek``, or a module beside them. An import goes to a lower floor or stays in its room.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import tokenseek

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tokenseek"

# From the ground up. Rooms of one floor do not import each other.
FLOORS = (
    {"errors", "labels", "quiet", "spelling", "versions"},
    {"imported"},
    {"decoder", "index", "selection"},
    {"tiling"},
    {"config", "ulysses"},
    {"launching", "reporting", "seeking"},
    {"data", "ditching"},
    {"models", "parallel"},
    {"training"},
    {"evaluation", "planning"},
    {"runs"},
    {"sweeps"},
    {"commands"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"accelerate", "datasets", "deepspeed", "lm_eval", "matplotlib", "peft", "torch", "transformers", "trl"}


@cache
def modules() -> dict[str, ast.Module]:
    """By dotted name, with the syntax of each."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(module: str) -> set[tuple[str, str]]:
    """Modules of ours that a module imports, anywhere in it; each with the name that is taken from it, if any.

    Imports for type checkers count: who reads the one module has to know the other.
    """
    found = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokenseek":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add((inner, "") if inner in modules() else (node.module, alias.name))
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "tokenseek"}
    return found


def test_every_room_has_a_floor():
    assert {room_of(module) for module in modules()} - {""} == set(FLOOR)


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_no_import_climbs(room):
    climbing = [
        f"{module} imports {target}"
        for module in modules()
        if room_of(module) == room
        for target, _ in imports(module)
        if room_of(target) not in ("", room) and FLOOR[room_of(target)] >= FLOOR[room]
    ]
    assert not climbing


def test_no_circle_of_modules():
    # The package's own face imports nothing before a name of it is used.
    graph = {module: {target for target, _ in imports(module)} - {module, "tokenseek"} for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_private_names_stay_in_their_room():
    taken = [
        f"{module} imports {name} of {target}"
        for module in modules()
        for target, name in imports(module)
        if re.match(r"_(?!_)", name or target.rpartition(".")[2]) and room_of(target) != room_of(module)
    ]
    assert not taken


def test_no_mocks_in_production():
    for module, tree in modules().items():
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not {"mock", "unittest", "unittest.mock", "pytest"} & set(names), module


def test_only_commands_print():
    """The library logs or returns lines; `print` by name counts too (a default, an argument)."""
    for module, tree in modules().items():
        if room_of(module) not in ("commands", "cli"):
            used = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "print"]
            used += [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "print"]
            assert not used, f"{module}, line {used[0].lineno}"


@pytest.mark.parametrize("module", ["tokenseek", "tokenseek.cli", "tokenseek.config", "tokenseek.commands.train"])
def test_heavy_libraries_are_imported_late(module):
    """A mistake in a configuration is reported before anybody waits for torch."""
    code = f"import sys, {module}; print(*[name for name in {sorted(HEAVY)} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.stdout, run.stderr, run.returncode) == ("\n", "", 0)


def test_type_checkers_see_the_names_of_the_package():
    (checked,) = (node for node in modules()["tokenseek"].body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in checked.body for alias in node.names}
    assert seen == tokenseek._WHERE


def test_the_page_lists_the_same_floors():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    floors = re.findall(r"^\| \d+ \| (.+?) \|", page, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", floor)) for floor in floors] == [set(floor) for floor in FLOORS]


def test_the_page_names_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tokenseek|tests|launch|docs|benchmarks)/[\w/.-]+)`", page)
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]
    for file, name in re.findall(r"`(tokenseek/[\w/]+\.py)`: `(\w+)", page):
        assert re.search(rf"\b(?:def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8")), (file, name)
