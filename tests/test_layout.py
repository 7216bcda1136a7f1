"""Where things are.

Rooms, the subpackages of examples/pipeline, import only rooms before them. The benchmarks' helpers import no command,
and the benchmarks' README lists every command.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("running", "views", "data", "models", "evaluation", "figures", "training", "experiments")  # lowest first
PACKAGES = ("measuring", "breaking", "comparing")
COMMANDS = sorted(file.name for file in (ROOT / "benchmarks").glob("[!_]*.py"))


def imported(folder: Path) -> set[str]:
    """Return what the files below a folder import, anywhere in them; each name of a "from" import counts on its own."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file} has a relative import"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_rooms_and_packages_are_those_that_there_are() -> None:
    for folder, names in ((ROOT / "examples" / "pipeline", ROOMS), (ROOT / "benchmarks", PACKAGES)):
        assert {file.parent.name for file in folder.glob("*/__init__.py")} == set(names)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_before_it(room: str) -> None:
    names = imported(ROOT / "examples" / "pipeline" / room)
    rooms = {name.split(".")[1] for name in names if name.startswith("pipeline.")}
    assert rooms <= set(ROOMS[: ROOMS.index(room) + 1])
    scripts = {"benchmarks", *(file.stem for file in (ROOT / "examples").glob("*.py"))}
    assert {name.partition(".")[0] for name in names}.isdisjoint(scripts)


@pytest.mark.parametrize("package", PACKAGES)
def test_helpers_of_benchmarks_import_no_command(package: str) -> None:
    names = imported(ROOT / "benchmarks" / package)
    assert {name.split(".")[1] for name in names if name.startswith("benchmarks.")} <= set(PACKAGES)


def test_the_table_of_the_benchmarks_has_every_command_and_records_that_exist() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"^\| `(\w+\.py)", text, re.MULTILINE))) == COMMANDS
    links = re.findall(r"\]\((results/[^)]+\.md)\)", text)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / "benchmarks" / link).exists()] == []
