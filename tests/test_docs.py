"""The documentation: every public name is on an API page, and every figure in a table is in the records.

Examples on its pages and in the package run as doctests; those in docstrings of scripts run here. Dead links make
``sphinx-build -W`` fail in .ci/run.
"""

import doctest
import re
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import msf_core
from msf_core import metrics, schedules, search

ROOT = Path(__file__).resolve().parents[1]
API_PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
AUTODOC = re.compile(r"^\.\. auto\w+:: (\S+)$", re.MULTILINE)
DOCUMENTED = [name for page in API_PAGES for name in AUTODOC.findall(page.read_text())]


def defined_in(module: ModuleType) -> list[str]:
    """Return the public names that the module itself defines."""
    there = [name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__]
    return [name for name in there if not name.startswith("_")]


def public_objects() -> list[str]:
    """Return the full name under which users import each public object."""
    names = [f"msf_core.{name}" for name in msf_core.__all__]
    names += [f"msf_core.search.{name}" for name in search.__all__]
    for module in (metrics, schedules):
        names += [f"{module.__name__}.{name}" for name in defined_in(module)]
    return names


def find(name: str) -> object:
    return import_module(name) if name == "msf_core.reference" else attrgetter(name.removeprefix("msf_core."))(msf_core)


@pytest.mark.parametrize("name", public_objects())
def test_every_public_name_is_on_an_api_page(name: str) -> None:
    assert any(find(documented) is find(name) for documented in DOCUMENTED), f"{name} is on no page of docs/api"


def tables(folder: Path) -> list[tuple[str, list[str]]]:
    """Return the header and the rows of all tables on the pages below a folder."""
    text = "\n\n".join(page.read_text() for page in sorted(folder.rglob("*.md")))
    found = re.findall(r"^(\|.*\|)\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [(head, rows.splitlines()) for head, rows in found]


def test_tables_with_the_head_of_a_record_have_its_rows() -> None:
    records: dict[str, list[str]] = {}
    for head, rows in tables(ROOT / "benchmarks" / "results"):
        records.setdefault(head, []).extend(rows)
    shown = [(head, row) for head, rows in tables(ROOT / "docs") if head in records for row in rows]
    assert len({head for head, _ in shown}) > 5
    assert [row for head, row in shown if row not in records[head]] == []


def test_counted_operations_of_the_walkthrough_are_what_torch_counts() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")

    def mlp(inputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Linear(4096, 512))

    with torch.device("meta"):  # nothing is computed, only counted
        encoder, predictor, images = models.resnet50(), mlp(512), torch.empty(2, 3, 224, 224)
        encoder.fc = mlp(2048)
    with FlopCounterMode(display=False) as target, torch.no_grad():
        encoder(images)
    with FlopCounterMode(display=False) as forward:
        v = predictor(encoder(images))
    with FlopCounterMode(display=False) as backward:
        v.sum().backward()
    counted = {"online encoder": forward, "the same, backward": backward, "target encoder": target}
    rows = [row for _, rows in tables(ROOT / "docs" / "concepts") for row in rows]
    for step, counter in counted.items():
        (row,) = (row for row in rows if row.startswith(f"| {step}"))
        assert f"| {counter.get_total_flops() / len(images) / 1e9:#.3g} GFLOP | counted |" in row
    sizes = [sum(parameter.numel() for parameter in module.parameters()) / 1e6 for module in (encoder, predictor)]
    assert f"{sizes[0]:.1f} million parameters of the encoder, {sizes[1]:.1f} million of the predictor" in "".join(rows)


INTEGRATIONS = sorted((ROOT / "examples" / "integrations").glob("*.py"))


@pytest.mark.parametrize("file", INTEGRATIONS, ids=lambda file: file.name)
def test_every_integration_is_shown_on_a_page(file: Path) -> None:
    pages = [page.read_text() for page in (ROOT / "docs" / "integrations").glob("*.md")]
    assert any(f"{{literalinclude}} ../../{file.relative_to(ROOT).as_posix()}\n" in page for page in pages)


def scripts_with_examples() -> list[str]:
    """Modules of benchmarks and examples whose docstrings show calls."""
    found = []
    for folder, top in (("benchmarks", ROOT), ("examples", ROOT / "examples")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                found.append(".".join(file.relative_to(top).with_suffix("").parts))
    return found


@pytest.mark.parametrize("name", scripts_with_examples())
def test_examples_in_docstrings_of_scripts_hold(name: str) -> None:
    for part, peer in (("lightly", "lightly"), ("report", "matplotlib")):
        if part in name:
            pytest.importorskip(peer, reason=f"{peer}, which {name} imports, is not installed")
    result = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
