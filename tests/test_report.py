"""What a run prints and draws: lines and progress bar, labels in the pictures, and what Weights & Biases gets."""

import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from pipeline.figures import paper, pictures
from pipeline.running import progress
from pipeline.running.progress import Progress
from pipeline.training.loggers import check_logger, open_logger

EPOCH = {"epoch": 1, "step": 20, "loss": 0.5, "purity": float("nan"), "nn20": 0.75, "images_per_second": 1234.4}
DEVICE = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition; PyTorch 2.14.1; 2026-11-28"
TITLE = f"MSF, k = 5 on fashion-mnist, seed 0\n{DEVICE}"


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_an_epoch_is_a_line_and_only_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    errors = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with Progress(0, 2000, 100, batch_size=8, speaks=True) as shown:
        for step in range(1, 21):
            shown.after_step(step, 1, lambda: {"loss": 0.25})
        shown.after_epoch(EPOCH)
    line, rest = capsys.readouterr().out.split("\n", 1)
    assert line.startswith("epoch 1 of 100, step 20 of 2,000: loss 0.500, 20-NN 0.750, 1,234 images/s, ")
    assert line.endswith(" left")
    assert rest == ""
    assert ("20/2000" in errors.getvalue()) == terminal
    assert bool(errors.getvalue()) == terminal


def test_an_epoch_of_hours_is_not_silent_and_other_ranks_are(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0, 50)  # 50 seconds pass between readings
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    for speaks in (True, False):
        with Progress(100, 10_000, 2, batch_size=8, speaks=speaks) as shown:
            for step in range(101, 401):
                shown.after_step(step, 1, lambda: {"loss": 0.25, "purity": 0.5})
            shown.after_epoch(EPOCH | {"step": 10_000})
        said = capsys.readouterr().out.splitlines()
        assert len(said) == (3 if speaks else 0)
        if speaks:  # it is read every ten steps, 50 s apart: 13 readings exceed 600 s
            assert said[0] == (
                "epoch 1 of 2, step 230 of 10,000: loss 0.250, purity 0.500, 2 images/s, 14 h 37 min left"
            )
            assert "left" not in said[-1], "the run has ended"


def history(epochs: int, *missing: str) -> list[dict[str, Any]]:
    names = [name for name, _, _ in pictures.PANELS if name not in missing]
    scale = {"age": 12_345, "nn20": 1e-9}
    return [
        {"epoch": epoch, **{name: 0.9 + scale.get(name, 1) / epoch for name in names}} for epoch in range(1, epochs + 1)
    ]


def neighbors(queries: int, count: int, *titles: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
    images = np.zeros((queries, count, 8, 8, 3))
    right = [[(True, False, None)[place % 3] for place in range(count)] for _ in range(queries)]
    return images[:, 0], [{"title": title, "images": images, "right": right} for title in titles]


def values(places: int, seeds: int) -> dict[str, list[list[float]]]:
    return {name: np.linspace(0.9, 0.97, places * seeds).reshape(places, seeds).tolist() for name in ("1-NN", "20-NN")}


def points(panels: int) -> dict[str, np.ndarray]:
    return {f"epoch {number}": np.random.default_rng(0).normal(size=(60, 2)) for number in range(panels)}


LABELS = np.arange(60) % 10
LONG = [f"n02099601 golden retriever {number}" for number in range(10)]
BANKS = [256.0, 1_000, 4_000, 16_000, 64_000, 128_000, 256_000, 512_000, 1_024_000]
CURVES = {f"k = {k}, w/w": [[0.5 + k / 100] * 86] * 3 for k in range(12)}
DRAWINGS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "curves, 1 epoch": ("draw_curves", (history(1), TITLE)),
    "curves, 200 epochs without labels": ("draw_curves", (history(200, "purity", "nn20"), TITLE)),
    "neighbors, a few": ("draw_neighbors", (*neighbors(1, 1, "before training", "after epoch 200"), TITLE)),
    "neighbors, many": ("draw_neighbors", (*neighbors(8, 5, "before training", "after epoch 1000"), TITLE)),
    "neighbors, an epoch": ("draw_neighbors", (*neighbors(8, 2, "after epoch 86 of a long training"), TITLE)),
    "against, one": ("draw_against", ([1.0, 2, 5, 10, 20, 50], {"1-NN": [[0.9]] * 6}, TITLE, "k", True)),
    "against, large": ("draw_against", (BANKS, values(9, 3), TITLE, "rows", True)),
    "bars, one": ("draw_bars", (["x"], {"20-NN": [[1.0]]}, TITLE)),
    "bars, long": ("draw_bars", (LONG[:6], values(6, 3), TITLE)),
    "over epochs, one": ("draw_over_epochs", ({LONG[0]: [[0.5]]}, TITLE, "share of neighbors with the query's label")),
    "over epochs, many": ("draw_over_epochs", (CURVES, TITLE, "share of neighbors with the query's label")),
    "points, one": ("draw_points", (points(1), LABELS, LONG, TITLE)),
    "points, many": ("draw_points", (points(10), LABELS, LONG, TITLE)),
}


def labels_of(figure: Figure) -> list[tuple[str, Any]]:
    """Return every visible text and its box."""
    figure.draw_without_rendering()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks()
            out = not axes.axison
            hidden |= {
                label
                for tick in ticks
                for label in (tick.label1, tick.label2)
                if out or not low <= tick.get_loc() <= high
            }
            hidden |= {axis.label} if out else set()
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in found if text not in hidden]


@pytest.mark.parametrize("name", DRAWINGS)
def test_labels_never_touch_and_are_on_the_picture(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    function, arguments = DRAWINGS[name]
    for module in (pictures, paper):  # the positions of the labels are known without writing the pixels
        monkeypatch.setattr(module, "write_picture", lambda figure, path, dpi: figure)
    figure = getattr(pictures if hasattr(pictures, function) else paper, function)(tmp_path / "x.png", *arguments)
    labels = labels_of(figure)
    assert len(labels) >= 3
    for text, box in labels:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text
    for (one, box), (other, other_box) in itertools.combinations(labels, 2):
        assert not box.padded(-1).overlaps(other_box.padded(-1)), f"{one!r} and {other!r}"


def records_of(log: bytes) -> Iterator[bytes]:
    """Yield the records of an offline run: 7 bytes, then LevelDB's log format."""
    place, record = 7, b""
    while place + 7 <= len(log):
        left = 32_768 - place % 32_768
        if left < 7:  # padding at the end of a block
            place += left
            continue
        size, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        record += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.fixture
def wandb() -> Iterator[Any]:
    """The library, which reads the environment once in a process."""
    library = pytest.importorskip("wandb")
    library.teardown()
    yield library
    library.teardown()


def test_wandb_goes_on_with_its_run_and_gets_every_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any
) -> None:
    from wandb.proto import wandb_internal_pb2

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    check_logger("wandb")
    settings, notes = {"logger": "wandb", "k": 5}, {"before": {}}
    pictures.draw_curves(tmp_path / "curves.png", history(1), "title")
    for first in (0, 2):
        logger = open_logger(tmp_path, first, settings, notes)
        assert (logger.new, logger.last_step) == (first == 0, first)
        logger.steps([0.5, 0.25], [0.1, 0.05])
        logger.epoch(first + 2, {"purity": 0.75, "age": float("nan")})
        if first:
            logger.result(4, {"nn20": 0.5}, {"linear": 0.9}, settings, [tmp_path / "curves.png"])
        logger.close()
    wandb.teardown()  # waits for the process that writes
    stores = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.stem for path in stores] == [f"run-{notes['wandb_id']}"] * 2
    found: dict[int, dict[str, str]] = {}
    for path in stores:
        for data in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                found[int(items["_step"])] = items
    assert sorted(found) == [1, 2, 3, 4]
    assert [float(found[step]["step/loss"]) for step in found] == [0.5, 0.25, 0.5, 0.25]
    assert float(found[2]["epoch/purity"]) == 0.75
    assert "epoch/age" not in found[2]
    assert float(found[4]["epoch/nn20"]) == 0.5
    assert "curves" in str(found[4])


def test_wandb_without_a_login_is_said(monkeypatch: pytest.MonkeyPatch, wandb: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(wandb, "login", lambda prompt: prompt)  # whatever is configured on this machine
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match="WANDB_MODE=offline"):
        check_logger("wandb")
