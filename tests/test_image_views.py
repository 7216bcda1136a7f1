"""benchmarks/image_views.py: a small run from start to finish, and wrong flags."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_training import blank_pictures

pytest.importorskip("sklearn", reason="the trainer's sources need scikit-learn")

from benchmarks import image_views
from benchmarks.image_views import BEFORE, NOW, SMALL_BEFORE, SMALL_NOW, SMALL_PLAIN, WHOLE

SMALL = ["--device", "cpu", "--images", "3", "--size", "32", "--batch", "2", "--batches", "1", "--rounds", "2"]


def test_a_whole_run_writes_records_a_table_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["image_views.py", *SMALL, "--train-steps", "4", "--out", str(tmp_path / "out")])
    try:
        with blank_pictures():
            image_views.main()
    finally:
        torch.set_num_threads(threads)
    lines = (tmp_path / "out" / "image_views.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    rates = {r["parameters"]["method"]: r for r in records if r["name"] == "images_per_second"}
    lightly = image_views.lightly_transforms(32)
    assert set(rates) == {BEFORE, NOW, *WHOLE.values(), *lightly, SMALL_BEFORE, SMALL_NOW, SMALL_PLAIN}
    for method, base in ((NOW, BEFORE), (WHOLE[NOW], WHOLE[BEFORE]), (SMALL_NOW, SMALL_BEFORE), (BEFORE, BEFORE)):
        ratio = rates[method]["median"] / rates[base]["median"]
        assert rates[method]["derived"]["times_before"] == pytest.approx(ratio)
    parts = [r["parameters"]["part"] for r in records if r["name"] == "part"]
    assert len(parts) == len(set(parts)) == 12
    (trained,) = (r for r in records if r["name"] == "training")
    assert 0 < trained["derived"]["data_share"] < 1
    assert all(r["environment"]["instructions"] for r in records)
    report = (tmp_path / "out" / "image_views.md").read_text()
    assert f"| {NOW} |" in report
    assert "unmeasured, no GPU" in report
    with Image.open(tmp_path / "out" / "image_views.png") as picture:
        assert picture.width > 800


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch: must be a whole number of at least 1"),
        (["--data", "/nowhere"], "--data /nowhere: no JPEGs there"),
        (["--train-steps", "-1"], "--train-steps must be at least 0"),
    ],
)
def test_a_wrong_flag_ends_with_a_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["image_views.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        image_views.parse_arguments()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
