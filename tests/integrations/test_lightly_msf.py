"""examples/integrations/lightly_msf.py runs, its diff turns BYOL into it and back, and that BYOL runs too."""

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightly", reason="this example needs lightly: pip install lightly")
pytest.importorskip("sklearn", reason="the example's digits are scikit-learn's")

from lightly.loss import NegativeCosineSimilarity
from PIL import Image

from msf_core import MeanShiftLoss

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "integrations" / "lightly_msf.py"
DIFF = EXAMPLE.with_name("lightly_byol_to_msf.diff")
BATCH, IMAGES, EPOCHS = 4, 9, 2
Run = Callable[[Path], dict[str, Any]]


def hunks() -> list[tuple[str, str]]:
    """Return the text of every hunk of the diff, before and after it."""
    bodies = re.split(r"^@@.*\n", DIFF.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    pairs = []
    for body in bodies:
        lines = body.splitlines(keepends=True)
        assert {line[0] for line in lines} <= {" ", "-", "+"}
        pairs.append(tuple("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +")))
    return pairs  # type: ignore[return-value]


def byol() -> str:
    """Return the example with the diff reversed."""
    text = EXAMPLE.read_text(encoding="utf-8")
    for before, after in hunks():
        assert text.count(after) == 1
        text = text.replace(after, before)
    return text


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a script on a small folder of images, and return its global variables."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(IMAGES):
        pixels = torch.randint(256, (40, 36, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(images / f"{number}.png")
    command = f"x.py --data {images} --epochs {EPOCHS} --batch-size {BATCH}"

    def run_script(path: Path) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", command.split())
        return runpy.run_path(str(path))

    return run_script


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"epoch: \d\d, loss: (\S+)", printed)]


def test_the_example_trains_by_mean_shift(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    made = run(EXAMPLE)
    criterion, model = made["criterion"], made["model"]
    assert isinstance(criterion, MeanShiftLoss)
    assert criterion.k == 5
    steps = EPOCHS * (IMAGES // BATCH)
    assert criterion.steps == steps
    assert len(criterion.bank) == steps * BATCH  # one view of an image a step
    printed = losses(capsys.readouterr().out)
    assert len(printed) == EPOCHS
    assert all(0 < loss < 4 for loss in printed)
    for online, target in ((model.backbone, model.backbone_momentum), (model.prediction_head, None)):
        moved = [parameter for parameter in online.parameters() if parameter.grad is not None]
        assert moved == []  # zero_grad leaves none
        assert all(parameter.requires_grad for parameter in online.parameters())
        assert target is None or not any(parameter.requires_grad for parameter in target.parameters())
    pairs = list(zip(model.backbone.parameters(), model.backbone_momentum.parameters(), strict=True))
    assert not any(torch.equal(f, g) for g, f in pairs if g.ndim == 4), "the target must follow, not be the same"


def test_taken_back_the_diff_leaves_lightlys_byol(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "byol.py").write_text(byol(), encoding="utf-8")
    made = run(tmp_path / "byol.py")
    assert type(made["criterion"]) is NegativeCosineSimilarity
    assert "MemoryBank" not in made
    printed = losses(capsys.readouterr().out)
    assert len(printed) == EPOCHS
    assert all(-1 <= loss <= 1 for loss in printed)


def test_the_diff_makes_the_example_of_byol_in_fewer_than_15_lines() -> None:
    text = byol()
    for before, after in hunks():
        assert text.count(before) == 1
        text = text.replace(before, after)
    assert text == EXAMPLE.read_text(encoding="utf-8")
    body = DIFF.read_text(encoding="utf-8").split("+++ byol.py\n")[1]
    changed = [line for line in body.splitlines() if line[0] in "+-"]
    assert 0 < len(changed) < 15
    page = (EXAMPLE.parents[2] / "docs" / "integrations" / "lightly.md").read_text(encoding="utf-8")
    assert "{literalinclude} ../../examples/integrations/lightly_byol_to_msf.diff\n" in page


def test_patch_takes_the_diff(tmp_path: Path) -> None:
    if shutil.which("patch") is None:
        pytest.skip("the command `patch` is not installed")
    script = tmp_path / "byol.py"
    # lightly's own example is shorter, so the line numbers in the diff must not matter.
    script.write_text("".join(byol().splitlines(keepends=True)[20:]), encoding="utf-8")
    subprocess.run(["patch", "byol.py", str(DIFF)], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    expected = "".join(EXAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)[20:])
    assert script.read_text(encoding="utf-8") == expected


def test_accuracy_is_of_features_and_the_digits_are_whole(run: Run) -> None:
    made = run(EXAMPLE)
    digits = made["Digits"]()
    assert len(digits) == 1797
    assert {image.size for image in digits.images} == {(32, 32)}
    accuracy = made["hundred_label_accuracy"]
    assert accuracy(nn.Flatten(), digits) > 0.75  # by raw pixels
    assert accuracy(nn.Sequential(nn.Flatten(), nn.Threshold(1e9, 1.0)), digits) < 0.2  # all features the same


def test_each_step_moves_the_target_first_and_each_side_sees_its_own_view(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightly.models import utils
    from lightly.transforms import byol_transform
    from torch.nn.modules.module import register_module_forward_pre_hook

    moves: list[tuple[bool, float]] = []
    seen: set[tuple[bool, int]] = set()
    real = utils.update_momentum

    def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
        pairs = zip(model.parameters(), model_ema.parameters(), strict=True)
        moves.append((isinstance(model, nn.Sequential), m))
        assert all(g.requires_grad and not f.requires_grad for g, f in pairs)
        real(model, model_ema, m)

    def look(module: nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            seen.add((module.weight.requires_grad, round(float(given[0].mean()))))

    monkeypatch.setattr(utils, "update_momentum", update_momentum)
    for number in (1, 2):
        view = getattr(byol_transform, f"BYOLView{number}Transform")
        monkeypatch.setattr(view, "__call__", lambda self, image, n=number: n + torch.randn(3, 32, 32) / 9)
    with register_module_forward_pre_hook(look):
        made = run(EXAMPLE)
    assert seen == {(False, 1), (True, 2)}
    assert moves == [(backbone, m) for m in (0.97, 1.0) for _ in range(IMAGES // BATCH) for backbone in (True, False)]
    model = made["model"]
    trained = [*model.backbone.parameters(), *model.projection_head.parameters(), *model.prediction_head.parameters()]
    assert {id(parameter) for parameter in made["optimizer"].state} == {id(parameter) for parameter in trained}


def test_the_targets_view_keeps_the_colors(run: Run) -> None:
    transform = run(EXAMPLE)["transform"]
    views = [transform(Image.new("RGB", (40, 40), (200, 30, 90))) for _ in range(20)]
    assert all(torch.allclose(weak, views[0][0]) for weak, _ in views)
    assert not all(torch.allclose(strong, views[0][1]) for _, strong in views)
