"""benchmarks/methods.py: losses against slow references, every method for a few steps, records, and wrong input."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

pytest.importorskip("lightly", reason="the methods' losses are lightly's")
pytest.importorskip("faiss", reason="DeepCluster-v2 clusters with FAISS")

from lightly.loss import NTXentLoss

from benchmarks import methods
from benchmarks.comparing.core import DeepCluster, Method
from benchmarks.comparing.learners import BASELINES, METHODS, RAW_PIXELS, UNTRAINED
from benchmarks.comparing.losses import (
    cluster_prediction,
    consistent_contrast,
    similarity_distillation,
    spherical_kmeans,
)
from benchmarks.comparing.recipe import RECIPES, new_backbone, open_images, parts_of
from benchmarks.comparing.runs import Place, Run, epochs_of, optimizer_of, step_of
from benchmarks.comparing.table import ORDER, PAPER, paired, passes_of
from pipeline.figures.paper import spread_of

CPU = torch.device("cpu")
TINY = replace(
    RECIPES["digits"], batch_size=16, bank_size=64, hidden=16, dim=8, wide=24, prototypes=6, steps=4, sweep_steps=2
)
FLAGS = ["--batch-size", "16", "--bank-size", "48", "--hidden", "16", "--dim", "8", "--wide", "24", "--prototypes", "6"]


def unit(count: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).double(), dim=1)


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def products(x: Tensor, rows: Tensor, temperature: float) -> list[float]:
    return [sum(a * b for a, b in zip(x.tolist(), row, strict=True)) / temperature for row in rows.tolist()]


# The losses that are implemented here, compared number by number with the papers' formulas.


def test_isd_is_the_formula_and_its_gradient_goes_to_the_student_alone() -> None:
    v, u, anchors = unit(5, 7, 1).requires_grad_(), unit(5, 7, 2).requires_grad_(), unit(13, 7, 3)
    expected = [kl(softmax(products(u[i], anchors, 0.2)), softmax(products(v[i], anchors, 0.3))) for i in range(5)]
    loss = similarity_distillation(v, u, anchors, student=0.3, teacher=0.2)
    assert loss.item() == pytest.approx(sum(expected) / 5)
    loss.backward()
    assert u.grad is None
    assert v.grad.norm() > 0
    assert similarity_distillation(u, u, anchors, student=0.2, teacher=0.2).item() == pytest.approx(0, abs=1e-12)


def test_co2_is_the_formula_and_without_its_consistency_moco() -> None:
    q, p, negatives = unit(5, 7, 1).requires_grad_(), unit(5, 7, 2).requires_grad_(), unit(13, 7, 3)
    expected = []
    for i in range(5):
        positive, of_q = products(q[i], p[i : i + 1], 0.2), products(q[i], negatives, 0.2)
        by_q, by_p = softmax(products(q[i], negatives, 0.5)), softmax(products(p[i], negatives, 0.5))
        expected.append(-math.log(softmax(positive + of_q)[0]) + 3 * (kl(by_p, by_q) + kl(by_q, by_p)) / 2)
    loss = consistent_contrast(q, p, negatives, temperature=0.2, consistency=0.5, alpha=3.0)
    assert loss.item() == pytest.approx(sum(expected) / 5)
    loss.backward()
    assert p.grad is None
    assert q.grad.norm() > 0
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(13, 7))
    theirs.memory_bank.bank = negatives.float()
    ours = consistent_contrast(q, p, negatives, temperature=0.2, consistency=0.5, alpha=0.0)
    torch.testing.assert_close(ours.float(), theirs(q.float(), p.float()))


def test_deepcluster_is_the_formula_and_leaves_out_images_without_a_cluster() -> None:
    z, centroids = unit(4, 7, 1).requires_grad_(), torch.stack([unit(3, 7, 2), unit(3, 7, 3)])
    assignments = torch.tensor([[0, 2, -1, 1], [1, 1, -1, 0]])
    expected = [
        -math.log(softmax(products(z[i], centroids[head], 0.1))[int(assignments[head, i])])
        for head in range(2)
        for i in (0, 1, 3)
    ]
    loss = cluster_prediction(z, centroids, assignments, temperature=0.1)
    assert loss.item() == pytest.approx(sum(expected) / 6)
    loss.backward()
    assert z.grad[2].norm() == 0 < z.grad[0].norm()
    assert cluster_prediction(z, centroids, torch.full((2, 4), -1), 0.1).item() == 0


def test_kmeans_gives_unit_centroids_and_the_nearest_to_each_row() -> None:
    middles = torch.eye(5)[:4]
    rows = F.normalize(middles.repeat(20, 1) + 0.05 * torch.randn(80, 5), dim=1)
    centroids, nearest = spherical_kmeans(rows, 4, seed=1)
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(4))
    assert torch.equal(nearest, (rows @ centroids.T).argmax(dim=1))
    assert len({tuple(nearest[place::4].tolist()) for place in range(4)}) == 4, "a cluster for each middle"
    for place in range(4):
        assert len(nearest[place::4].unique()) == 1


# Every method, trained.


@pytest.mark.parametrize("name", [name for name in METHODS if name not in BASELINES])
def test_each_method_trains_its_backbone_and_moves_its_target_and_its_bank(name: str) -> None:
    run = Run(name, 0.05, 3, 0, True, TINY)
    entry = METHODS[name]
    source = open_images(TINY, "", entry.augmentation, seed=0, device=CPU, validation=True)
    backbone, features = new_backbone(TINY, source.image_shape)
    method: Method = entry.build(backbone, features, TINY).train()
    optimizer = optimizer_of(method, run)
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert len({id(weight) for weight in trained}) == len(trained)
    if method.target is not None:
        assert not {id(weight) for weight in trained} & {id(weight) for weight in method.target.parameters()}
    views = epochs_of(source, run)
    method.start([next(views) for _ in range(source.train_size // TINY.batch_size)], source.train_size)
    first = {key: value.clone() for key, value in method.state_dict().items() if isinstance(value, Tensor)}
    for _ in range(3):
        assert step_of(method, optimizer, *next(views)).isfinite()
    for key, weight in backbone.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.isfinite().all(), key
        assert weight.grad.norm() > 0, key
    same = [key for key, value in method.state_dict().items() if key in first and torch.equal(value, first[key])]
    assert not [key for key in same if key.startswith("encoder.backbone")]
    if method.target is not None:
        assert not [key for key in same if key.startswith("target.") and key.endswith("weight")]
        assert method.target.updates == 3
    queues = [key for key in first if key.endswith(("bank.rows", "memory_bank.bank"))]
    assert not set(queues) & set(same), "the bank must have new rows"
    needs_bank = name.startswith("msf") or name in ("isd", "co2", "deepcluster-v2")
    assert bool(queues) == needs_bank, "lightly's queues are not in a state"
    for queue in [module for module in method.modules() if hasattr(module, "bank_ptr") and module.size != (0,)]:
        assert int(queue.bank_ptr) == 48, "3 batches of 16"


def test_deepcluster_predicts_the_clusters_of_the_last_epoch() -> None:
    run = Run("deepcluster-v2", 0.05, 3, 0, True, TINY)
    source = open_images(TINY, "", "s/s", seed=0, device=CPU, validation=True)
    method = DeepCluster(*new_backbone(TINY, source.image_shape), TINY).train()
    steps = source.train_size // 16
    views = epochs_of(source, run)
    epoch = [next(views) for _ in range(steps)]
    assert len(torch.cat([ids for *_, ids in epoch]).unique()) == steps * 16, "every image once"
    method.start(iter(epoch), source.train_size)
    assert (method.clusterings, len(method.bank)) == (1, steps * 16)
    assert (method.assignments >= 0).sum(dim=1).tolist() == [steps * 16] * 3
    rows = method.bank.rows[method.bank.ids == epoch[0][2][0]]
    for head in range(3):
        assert method.assignments[head, epoch[0][2][0]] == (rows @ method.centroids[head].T).argmax()
    before = method.centroids.clone()
    for number in range(steps):
        assert torch.equal(method.centroids, before), number
        method.loss(*epoch[number])
        method.after_step()
    assert method.clusterings == 2
    assert not torch.equal(method.centroids, before)


def test_passes_are_counted() -> None:
    found = {name: passes_of(name, TINY, (1, 16, 16)) for name in METHODS}
    one = {"msf", "msf-ss", "msf-ww", "byol-asym", "byol-asym-ws", "isd", "co2", "moco-v2"}
    assert {name for name, passes in found.items() if passes == (1, 1)} == one
    assert {name for name, passes in found.items() if passes == (2, 2)} == {"byol", "dino"}
    assert {name for name, passes in found.items() if passes == (0, 0)} == set(BASELINES)
    assert all(found[name] == (2, 0) for name in found.keys() - one - {"byol", "dino", *BASELINES})


# The command.


def call(*arguments: str) -> int:
    try:
        return methods.main(list(arguments))
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_a_comparison_takes_each_methods_best_rate_and_repeats_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "FACTORS", (0.5, 1e9))
    flags = [*FLAGS, "--out", str(tmp_path), "--methods", "msf", "simclr", UNTRAINED, "--steps", "10", "--seeds"]
    assert call(*flags, "1") == 0
    printed = capsys.readouterr().out
    assert "sweep: 4 runs, 0 of them finished before" in printed
    records = {path.name: json.loads(path.read_text()) for path in (tmp_path / "runs").iterdir()}
    swept = {name: record for name, record in records.items() if "validation" in name}
    assert len(swept) == 4
    assert all(record["images"] == {"train": 1122, "val": 225, "classes": 10} for record in swept.values())
    assert all(record["run"]["steps"] == 2 for record in swept.values())
    msf = records["msf-lr-0.05-steps-10-seed-0.json"]
    assert msf["images"] == {"train": 1347, "val": 450, "classes": 10}
    assert msf["results"].keys() == {"nn1", "nn20", "linear", "one_label", "ten_labels", "purity"}
    assert msf["images_seen"] == 160
    assert math.isfinite(msf["loss"])
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    cell = f"{100 * msf['results']['linear']:.1f}"
    assert f"| MSF w/s | w/s | 0.05 | 10 | {cell} |" in table
    assert "| 1 + 1 | – | – | 72.4 | 62.0 | 64.9 |" in table
    judged = {name: record["results"]["nn20"] for name, record in records.items() if name not in swept}
    best = METHODS[max(judged, key=lambda name: judged[name]).partition("-lr-")[0]].title
    assert f"{best} by 20-NN ({100 * max(judged.values()):.1f})" in table
    assert "best of 0.05, 1e+08 by 20-NN on 225 training images held out" in table
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == len(records) == 7

    stopped = tmp_path / "runs" / "msf-lr-0.05-steps-10-seed-0.json"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir() if path != stopped}
    stopped.unlink()
    assert call(*flags, "1") == 0
    assert "comparison: 3 runs, 2 of them finished before" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    again = json.loads(stopped.read_text())
    assert (again["results"], again["loss"]) == (msf["results"], msf["loss"]), "settings and seed determine a run"

    moved = tmp_path / "elsewhere"
    moved.mkdir()
    here = msf["environment"]
    threads = f"{here['threads']} thread{'s' * (here['threads'] > 1)}"
    machine = f"{here['instructions']}, {threads}, PyTorch {here['versions']['torch']}"
    assert f"- Trained on {here['device']}, {machine} (3 runs).\n" in table
    elsewhere = again | {"environment": here | {"device": "a faster CPU"}}
    lines = (tmp_path / "records.jsonl").read_text().replace(json.dumps(again), json.dumps(elsewhere))
    (moved / "records.jsonl").write_text(lines)
    assert call(*flags, "1", "--out", str(moved)) == 0
    assert "comparison: 3 runs, 3 of them finished before" in capsys.readouterr().out
    both = f"- Trained on {here['device']}, {machine} (2 runs); a faster CPU, {machine} (1 run).\n"
    assert both in (moved / "table.md").read_text()
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "records.jsonl").write_text('{"run": 1}\n')
    assert call(*flags, "1", "--out", str(wrong)) == 2
    assert "records.jsonl, line 1, is not the record of a run" in capsys.readouterr().err

    assert call(*flags, "1", "--budget", "passes", "--lr", "0.05") == 0
    halved = (tmp_path / "table-passes.md").read_text()
    assert "| SimCLR | s/s | 0.05 | 5 |" in halved
    assert "| MSF w/s | w/s | 0.05 | 10 |" in halved
    assert call(*flags, "1", "--dim", "9") == 2
    assert "is a run with another dim, 8 instead of 9: choose another --out" in capsys.readouterr().err


def test_a_rate_at_which_a_method_diverges_is_not_chosen_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "FACTORS", (1e30, 1e31))
    flags = [*FLAGS, "--out", str(tmp_path), "--methods", "vicreg", *BASELINES, "--steps", "105", "--seeds", "2"]
    assert call(*flags) == 0
    printed = capsys.readouterr().out
    assert "| VICReg | diverged | diverged |" in printed
    assert "VICReg diverged at all of these learning rates: left out, give a lower --lr" in printed
    assert "| untrained |" in printed
    assert "| raw pixels | – | – | – | 97.6 | 98.4 | 97.1 | 63.2 | 91.1 | " in printed, "as the trainer has them"
    assert len(list((tmp_path / "runs").glob(f"{RAW_PIXELS}-*"))) == 1, "another seed would be the same"
    monkeypatch.setattr(methods, "MOST_RAW_VALUES", 1347 * 256 - 1)
    assert call(*flags) == 0
    printed = capsys.readouterr().out
    assert "raw pixels are left out: the training images have 344,832 values" in printed
    assert "| raw pixels |" not in printed


def test_runs_side_by_side_leave_the_same_records_and_failures_are_named(tmp_path: Path) -> None:
    recipe = replace(TINY, steps=2)
    options = {"data": "", "device": "cpu", "workers": 0, "images": {}}
    alone, together = (Place(tmp_path / name, **options) for name in ("alone", "together"))
    run = Run("msf", 0.05, 2, 0, True, recipe)
    broken = Run("msf", 0.05, 2, 7, True, replace(recipe, dataset="cifar10"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    methods.finish([run], alone, jobs=1)
    torch.set_num_threads(threads)
    with pytest.raises(RuntimeError, match=r"-seed-7: ValueError: cifar10 is neither in"):
        methods.finish([run, broken], replace(together, data=str(tmp_path / "nowhere")), jobs=2)
    one, other = alone.record_of(run), together.record_of(run)
    assert one is not None
    assert other is not None
    assert (one["results"], one["loss"]) == (other["results"], other["loss"])
    assert together.record_of(broken) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nosuch"], "invalid choice: 'nosuch'"),
        (["--data", "nowhere"], "no such folder: nowhere"),
        (["--dataset", "fashion-mnist"], "--dataset fashion-mnist needs --data DIR"),
        (["--dataset", "digits", "--data", "x"], "--data goes with --dataset folder, fashion-mnist or cifar10"),
        (["--lr", "nan"], "--lr must be above 0 and finite, got nan"),
        (["--jobs", "0"], "must be a whole number of at least 1, got '0'"),
        (["--batch-size", "4000"], "--batch-size 4000 is more than the 1347 training images"),
        (["--arch", "nosuch"], "no model 'nosuch' in torchvision or timm"),
        (["--momentum", "2"], "momentum must be between 0 and 1, got 2.0"),
        (["--sweep", "--cost"], "not allowed with argument"),
    ],
)
def test_wrong_input_is_one_line_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert call(*arguments, "--out", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_cost_of_a_step_is_measured_and_comes_into_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "COST_ROUNDS", 2)
    flags = [*FLAGS, "--out", str(tmp_path), "--methods", "msf", "deepcluster-v2", "--steps", "2", "--seeds", "1"]
    assert call(*flags, "--cost") == 0
    assert "MSF w/s: " in capsys.readouterr().out
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["methods"].keys() == {"msf", "deepcluster-v2"}
    assert all(found["seconds"]["median"] > 0 and found["rounds"] == 2 for found in cost["methods"].values())
    assert call(*flags, "--lr", "0.05", "--methods", "msf") == 0
    (row,) = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| MSF w/s")]
    assert "| – | – |" not in row.partition("1 + 1")[2]


# A user's own images.


def test_a_folder_without_val_is_divided_class_by_class_the_same_for_all_runs(tmp_path: Path) -> None:
    for label, count in (("a", 12), ("b", 6)):
        (tmp_path / label).mkdir()
        for number in range(count):
            Image.new("RGB", (20, 20), (number * 9, 40, 90)).save(tmp_path / label / f"{number}.png")
    recipe = replace(RECIPES["folder"], image_size=16, batch_size=4)
    kept = []
    for seed in (0, 1):
        options = {"seed": seed, "device": CPU, "workers": 0}
        source = open_images(recipe, str(tmp_path), "w/s", validation=False, **options)
        held = open_images(recipe, str(tmp_path), "w/s", validation=True, **options)
        assert source.labels("val").tolist() == [0, 0, 1]
        assert (source.train_size, held.train_size, held.size("val")) == (15, 12, 3)
        kept.append(source.names())
        first, second, *_ = next(source.train_views(0, 0))
        assert first.shape == second.shape == (4, 3, 16, 16)
    assert len(kept[0]) == 15
    assert kept[0] == kept[1]
    assert not set(parts_of(torch.tensor([0] * 5 + [1] * 5), 0.2)[0]) & set(
        parts_of(torch.tensor([0] * 5 + [1] * 5), 0.2)[1]
    )
    with pytest.raises(ValueError, match="class 7 has only one image"):
        parts_of(torch.tensor([3, 3, 7]), 0.2)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "flat" / "0.png")
    with pytest.raises(ValueError, match="has no class folders: methods are compared by labels"):
        open_images(recipe, str(tmp_path / "flat"), "w/s", validation=False, seed=0, device=CPU)


def test_k_5_and_k_1_are_compared_seed_by_seed_and_diverged_runs_left_out() -> None:
    def of(*values: float | None) -> list[dict]:
        return [{"results": {} if value is None else dict.fromkeys(ORDER, value)} for value in values]

    records = {
        "msf": of(0.52, 0.64, 0.9, 0.56, 0.7),
        "byol-asym-ws": of(0.5, 0.6, None, 0.5),
        "byol-asym": of(0.5, 0.6),
    }
    sentence, table = paired(records)
    assert "paired" in sentence
    (row,) = [line for line in table.splitlines() if "−" in line]
    differences = [2.0, 4.0, 6.0]  # t = 4 / (2 / √3) = 3.46, two degrees of freedom: p = 1 − t / √(t² + 2)
    p = 1 - 12**0.5 / (12 + len(differences) - 1) ** 0.5
    assert row.count(f"| +4.0 ± 2.0, 3 of 3, p = {p:.2g} ") == len(ORDER)
    assert paired({"msf": of(0.5, 0.6), "byol-asym": of(0.5, 0.6)}) == [], "no pair on the same views"
    assert paired({"msf": of(0.5), "byol-asym-ws": of(0.4)}) == [], "one seed is no deviation"


def test_the_papers_rows_are_those_of_methods_that_are_there() -> None:
    assert PAPER.keys() <= METHODS.keys()
    assert METHODS["msf"].augmentation == "w/s"


def test_the_committed_comparison_is_that_of_its_records() -> None:
    file = Path(methods.__file__).parent / "results" / "methods_fashion_mnist.jsonl"
    if not file.exists():
        pytest.skip("benchmarks/results has no records of the comparison")
    found: dict[str, dict[int, dict]] = {}
    for record in map(json.loads, file.read_text().splitlines()):
        if not record["run"]["validation"]:
            found.setdefault(record["run"]["method"], {})[record["run"]["seed"]] = record
    three = {name: [seeds[seed]["results"] for seed in range(3)] for name, seeds in found.items() if len(seeds) >= 3}
    cells = {
        name: [METHODS[name].title, *(spread_of([row[key] for row in rows]) for key in ORDER)]
        for name, rows in three.items()
    }
    assert len(cells) > 9
    page = [line.strip("| ").split(" | ") for line in file.with_suffix(".md").read_text().splitlines()]
    assert {tuple(of) for of in cells.values()} <= {(row[0], *row[3:]) for row in page}
    five = {name: [seeds[seed] for seed in sorted(seeds)] for name, seeds in found.items()}
    assert paired(five)
    assert "\n\n".join(paired(five)) in file.with_suffix(".md").read_text()
