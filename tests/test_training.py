"""The parts of the trainer: views, data sets, models, checkpoints, evaluation."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from msf_core.distributed import Ranks
from pipeline.data.bad_images import BadImages
from pipeline.data.digits import Digits
from pipeline.data.photos import Photos, workers_of
from pipeline.data.source import DataSource, Share, Views
from pipeline.data.trees import open_folder
from pipeline.evaluation import scores
from pipeline.evaluation.features import nearest_neighbor_accuracy
from pipeline.models.backbones import build_backbone, export_backbone
from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from pipeline.running.seeds import seed_of
from pipeline.training.report import keep_losses, write_losses
from pipeline.training.timing import TimedSearch, WaitClock, loader_limit
from pipeline.views.augment import DIGITS_VIEWS, DigitsView
from pipeline.views.crops import PER_VIEW, draws

CPU = torch.device("cpu")


# Flags of a small network that trains on photographs within seconds.
SMALL_NETWORK = ["--arch", "digits", "--image-size", "32", "--hidden", "32", "--dim", "16", "--bank-size", "32"]


def make_tree(root: Path, train: int = 6, val: int = 2, classes: int = 3, size: int = 40) -> Path:
    """Write JPEGs of noise, with a different tint for each class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
                pixels[..., label % 3] //= 4
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


@contextlib.contextmanager
def blank_pictures() -> Iterator[None]:
    """Replace the trainer's pictures with blank ones, since drawing them takes half the time of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        for draw in ("draw_curves", "draw_neighbors"):
            patch.setattr(f"pipeline.training.showing.{draw}", lambda path, *drawn: Image.new("RGB", (8, 8)).save(path))
        yield


def photos(
    root: Path,
    workers: int = 0,
    seed: int = 0,
    share: Share = Share(4),  # noqa: B008
    on_bad_image: str = "error",
) -> Photos:
    train, val, _ = open_folder(root)
    return Photos(
        train,
        val,
        size=32,
        has_labels=bool(train.classes),
        share=share,
        workers=workers,
        seed=seed,
        device=CPU,
        bad=BadImages(on_bad_image),
    )


def batches(source: DataSource, epoch: int, first: int = 0) -> list[Views]:
    return [tuple(part.clone() for part in batch) for batch in source.train_views(epoch, first)]


def joined_of(parts: list[Views]) -> Views:
    target, online, labels, ids = (torch.cat(part) for part in zip(*parts, strict=True))
    return target, online, labels, ids


def assert_same(ours: list[Views], theirs: list[Views]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_epoch_of_digits_is_a_function_of_seed_and_epoch() -> None:
    source = Digits("w/s", Share(64), seed=0, device=CPU)
    first = batches(source, epoch=0)
    assert len(first) == 1347 // 64
    _, _, labels, ids = joined_of(first)
    assert len(ids.unique()) == 1344
    assert torch.equal(source.labels("train")[ids], labels)
    assert_same(first, batches(Digits("w/s", Share(64), seed=0, device=CPU), epoch=0))
    assert_same(first[5:], batches(source, epoch=0, first=5))
    assert not torch.equal(first[0][0], batches(source, epoch=1)[0][0])
    assert not torch.equal(first[0][0], batches(Digits("w/s", Share(64), seed=1, device=CPU), epoch=0)[0][0])


def test_digits_are_split_by_class_and_normalized_by_the_training_set() -> None:
    source = Digits("w/s", Share(64), seed=3, device=CPU)
    (train, labels), (val, val_labels) = next(source.images("train")), next(source.images("val"))
    assert (len(train), len(val)) == (source.size("train"), source.size("val")) == (1347, 450)
    assert train.mean().abs() < 1e-5
    assert abs(train.std() - 1) < 1e-5
    shares = labels.bincount() / len(labels) - val_labels.bincount() / len(val_labels)
    assert shares.abs().max() < 0.005
    shown = source.displayable(val[:3])
    assert shown.shape == (3, 16, 16, 3)
    assert shown.min() >= 0
    assert shown.max() <= 1


def test_a_view_that_changes_nothing_is_the_image() -> None:
    images = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    still = DigitsView((1.0, 1.0), 1.0, 0, 0.0, (1.0, 1.0), 0.0, blur=0.0, noise=0.0)
    torch.testing.assert_close(still(images, torch.Generator().manual_seed(1)), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"area": (0.5, 0.6)},
        {"aspect": 1.5},
        {"degrees": 15},
        {"shear": 0.2},
        {"contrast": (0.5, 0.6)},
        {"brightness": 0.2},
        {"blur": 1.0},
        {"noise": 0.1},
    ],
)
def test_each_part_of_a_digits_view_changes_the_image(changes: dict) -> None:
    still = {
        "area": (1.0, 1.0),
        "aspect": 1.0,
        "degrees": 0,
        "shear": 0.0,
        "contrast": (1.0, 1.0),
        "brightness": 0.0,
        "blur": 0.0,
        "noise": 0.0,
    }
    images = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    view = DigitsView(**(still | changes))(images, torch.Generator().manual_seed(1))
    assert view.shape == images.shape
    assert ((view - images).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_strong_digit_views_differ_more_than_weak_ones() -> None:
    images = next(Digits("w/s", Share(64), seed=0, device=CPU).images("val"))[0]
    distance = {
        strength: (view(images, torch.Generator().manual_seed(0)) - images).abs().mean()
        for strength, view in DIGITS_VIEWS.items()
    }
    assert distance["s"] > 1.5 * distance["w"]


def test_views_of_a_photo_do_not_depend_on_the_workers_the_batch_the_ranks_or_on_where_the_epoch_began(
    tmp_path: Path,
) -> None:
    make_tree(tmp_path, train=8)
    alone, helped = photos(tmp_path, workers=0), photos(tmp_path, workers=2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = batches(alone, epoch=1)
    assert torch.equal(torch.get_rng_state(), before), "views must leave the global generator alone"
    assert_same(first, batches(helped, epoch=1))
    assert_same(first[2:], batches(helped, epoch=1, first=2))
    everything = joined_of(first)
    for share in (Share(24), Share(8), Share(12, accumulate=2)):
        assert_same([everything], [joined_of(batches(photos(tmp_path, share=share), epoch=1))])
    ranks = [batches(photos(tmp_path, share=Share(8, rank=rank, ranks=2)), epoch=1) for rank in range(2)]
    assert_same([everything], [joined_of([part for step in zip(*ranks, strict=True) for part in step])])
    assert not torch.equal(first[0][0], batches(alone, epoch=2)[0][0])
    assert not torch.equal(first[0][0], batches(photos(tmp_path, seed=1), epoch=1)[0][0])


def test_photos_of_several_modes_and_sizes_are_one_batch(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, train=2)
    pixels = np.random.default_rng(1).integers(0, 256, (40, 52, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., 0]).save(tree / "train" / "class0" / "gray.png")
    Image.fromarray(pixels).save(tree / "train" / "class0" / "alpha.png")
    Image.fromarray(pixels[:30, :20, 0].astype(np.uint16) * 257).save(tree / "train" / "class1" / "sixteen.tif")
    Image.fromarray(pixels[..., :3]).quantize(8).save(tree / "train" / "class1" / "palette.png")
    Image.fromarray(pixels, mode="CMYK").save(tree / "train" / "class2" / "cmyk.jpg")
    Image.fromarray(pixels[:1, :3, 0]).save(tree / "train" / "class2" / "tiny.bmp")
    ((target, online, labels, _),) = batches(photos(tree, share=Share(12)), epoch=0)
    assert target.shape == online.shape == (12, 3, 32, 32)
    assert labels.bincount().tolist() == [4, 4, 4]
    assert len(torch.cat([images for images, _ in photos(tree).images("train")])) == 12


def test_each_view_is_made_of_its_image_and_its_part_of_the_row(tmp_path: Path) -> None:
    source = photos(make_tree(tmp_path, train=4), share=Share(12))
    ((target, online, labels, ids),) = batches(source, epoch=3)
    crops = source._loader.dataset.items
    for place, key in enumerate(source._order):
        weak, strong, row, label, _ = crops[key]
        assert torch.equal(target[place], source._target(weak[None], row[None, :PER_VIEW])[0])
        assert torch.equal(online[place], source._online(strong[None], row[None, PER_VIEW:])[0])
        assert torch.equal(row, draws(seed_of(0), 3, key[1], 1)[0])
        assert (labels[place], ids[place]) == (label, key[1])
        assert not torch.equal(row, crops[4, key[1]][2]), "another epoch, other views"


def test_an_epoch_of_photos_sees_each_image_once(tmp_path: Path) -> None:
    source = photos(make_tree(tmp_path, train=4))
    _, _, labels, ids = joined_of(batches(source, 0))
    assert labels.bincount().tolist() == [4, 4, 4]
    assert ids.sort().values.tolist() == list(range(12))
    assert torch.equal(source.labels("train")[ids], labels)


def test_the_digits_backbone_is_the_recipes() -> None:
    backbone, features = build_backbone("digits", (1, 16, 16))
    assert (features, sum(parameter.numel() for parameter in backbone.parameters())) == (96, 172_872)


@pytest.mark.parametrize(
    ("arch", "features"), [("resnet18", 512), ("mobilenet_v3_small", 1024), ("densenet121", 1024), ("alexnet", 4096)]
)
def test_a_torchvision_export_loads_strictly_and_gives_equal_features(tmp_path: Path, arch: str, features: int) -> None:
    torch.manual_seed(0)
    backbone, found = build_backbone(arch, (3, 64, 64))
    assert found == features
    export_backbone(backbone, tmp_path / "backbone.safetensors")
    model = torchvision.models.get_model(arch, weights=None)
    tensors = load_file(tmp_path / "backbone.safetensors")
    model.load_state_dict(tensors, strict=True)
    classifier = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    with safe_open(tmp_path / "backbone.safetensors", "pt") as file:
        assert f"{classifier}.weight" in file.metadata()["classifier"]
    assert not tensors[f"{classifier}.weight"].any()
    model.set_submodule(classifier, nn.Identity())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), backbone.eval()(images))


def test_a_timm_export_loads_strictly(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    backbone, features = build_backbone("test_vit", (3, 160, 160))
    export_backbone(backbone, tmp_path / "backbone.safetensors")
    model = timm.create_model("test_vit", num_classes=0)
    model.load_state_dict(load_file(tmp_path / "backbone.safetensors"), strict=True)
    assert features == model.num_features


def test_a_model_that_cannot_serve_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="no model 'resnet5000'"):
        build_backbone("resnet5000", (3, 32, 32))
    with pytest.raises(ValueError, match="no linear classifier"):
        build_backbone("squeezenet1_0", (3, 64, 64))
    with pytest.raises(ValueError, match="does not take images"):
        build_backbone("resnet18", (1, 16, 16))


def test_a_crash_while_saving_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1, "criterion": {}}, Ranks())

    def crash(state: object, file: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"step": 2, "criterion": {}}, Ranks())
    assert load_checkpoint(path, needed={"step"}, ranks=Ranks())["step"] == 1


def test_a_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.arange(10_000), "criterion": {}}, Ranks())
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for damaged in (whole[:middle], b"", b"not a checkpoint at all", flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged or not a checkpoint of this script"):
            load_checkpoint(path, needed=set(), ranks=Ranks())
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="not a checkpoint of this script"):
        load_checkpoint(path, needed={"weights", "bank"}, ranks=Ranks())
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="not a checkpoint of this script"):
        load_checkpoint(path, needed=set(), ranks=Ranks())
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nowhere.pt", needed=set(), ranks=Ranks())


def test_losses_after_the_checkpoint_are_dropped_and_a_torn_file_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    write_losses(path, [0.5, 0.25], last_step=2)
    write_losses(path, [0.125], last_step=3)
    assert path.read_text() == "step,loss\n1,0.5\n2,0.25\n3,0.125\n"
    keep_losses(path, last_step=2)
    assert path.read_text() == "step,loss\n1,0.5\n2,0.25\n"
    for torn in ("", "step,lo", "step,loss\n1,0.5\n2,0."):
        path.write_text(torn)
        keep_losses(path, last_step=5)
        assert path.read_text() == "step,loss\n" + "1,0.5\n" * ("0.5" in torn)


def test_saving_leaves_folders_alone_that_are_not_its_own(tmp_path: Path) -> None:
    for name in ("bank-data", "bank-shards-mine", "bank-shards-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "bank-shards-mine" / "photo.jpg").touch()
    (tmp_path / "bank-shards-old" / "shard.safetensors").touch()
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1, "criterion": {}}, Ranks())
    assert {path.name for path in tmp_path.iterdir()} == {"bank-data", "bank-shards-mine", "checkpoint.pt"}


def test_evaluation_counts_what_it_says() -> None:
    # Two classes on two axes, but one training image of class 1 lies among class 0.
    train = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.2]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    val, val_labels = torch.tensor([[1.0, 0.01], [0.01, 1.0], [1.0, 0.19], [0.0, 1.0]]), torch.tensor([0, 1, 0, 1])
    features = {"train": (train, labels), "val": (val, val_labels)}
    assert nearest_neighbor_accuracy([features["train"]], 5, [features["val"]])["nn1"] == 0.75
    # k = 2: only the nearest other row. Those of rows 0, 2 and 3 share their label; rows 1 and 4 find each other.
    assert scores.purity(train, labels, k=2) == pytest.approx(3 / 5)
    assert set(scores.evaluate_features(features, k=2)) == set(scores.COLUMNS)


def test_few_labels_uses_that_many_a_class() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    centres = torch.randn(4, 8, generator=generator) * 3
    train = centres[labels] + torch.randn(200, 8, generator=generator)
    features = {"train": (train, labels), "val": (centres, torch.arange(4))}
    assert scores.few_labels(features, 1) > 0.6
    assert scores.few_labels(features, 10) == 1.0
    assert scores.linear_probe(features) == 1.0
    # With one label per class, mislabeled rows would matter; with shuffled labels, there is nothing left to learn.
    shuffled = {**features, "train": (train, labels[torch.randperm(200, generator=generator)])}
    assert scores.few_labels(shuffled, 10) < 0.6


def test_warming_up_gives_batchnorm_statistics_and_leaves_the_encoder_alone() -> None:
    torch.manual_seed(0)
    backbone, _ = build_backbone("digits", (1, 16, 16))
    warm = scores.warmed_up(backbone, Digits("w/s", Share(64), seed=0, device=CPU), Ranks(), batches=3)
    norm, warm_norm = backbone.stem[1], warm.stem[1]
    assert int(norm.num_batches_tracked) == 0
    assert int(warm_norm.num_batches_tracked) == 3
    assert not torch.equal(norm.running_mean, warm_norm.running_mean)
    assert torch.equal(backbone.stem[0].weight, warm.stem[0].weight)


def test_a_timed_search_finds_the_same_and_counts_its_time() -> None:
    rows = nn.functional.normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    timed = TimedSearch("torch", CPU)
    similarity, index = timed.topk(rows[:3], rows, 1)
    assert index.flatten().tolist() == [0, 1, 2]
    torch.testing.assert_close(similarity, torch.ones(3, 1))
    assert timed.take_seconds() > 0
    assert timed.take_seconds() == 0


def test_the_wait_for_items_is_counted_and_the_work_on_them_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pipeline.training.timing.time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = WaitClock(CPU)

    def items() -> Iterator[int]:
        for number in range(3):
            now[0] += 2
            yield number

    for _ in clock.over(items()):
        now[0] += 100
    assert clock.take_seconds() == 6
    assert clock.take_seconds() == 0


def test_workers_are_the_cores_that_a_rank_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.photos.cores", lambda: 16)
    assert (workers_of(-1), workers_of(0), workers_of(3)) == (16, 0, 3)
    for ranks, expected in ((1, 16), (3, 5), (40, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert workers_of(-1) == expected


def test_a_loader_that_is_the_limit_is_said_with_what_helps() -> None:
    row = {"epoch": 2, "data_share": 0.46, "images_per_second": 812.3}
    said = loader_limit(row, workers=4, cores=16)
    assert "waited for images for 46% of epoch 2, at 812 images/s with 4 workers per rank" in said
    assert "there are 16 cores for more --workers" in said
    assert "smaller files" in loader_limit(row, workers=16, cores=16)
    assert loader_limit(row | {"data_share": 0.05}, workers=4, cores=16) == ""
