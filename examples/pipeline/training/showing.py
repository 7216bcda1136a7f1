"""What a run reports about its encoder: rows of the table before and after training, pictures, weights, a verdict."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from msf_core.search import find_backend
from pipeline.data.source import UNKNOWN, UNREADABLE, DataSource
from pipeline.evaluation.features import features_of
from pipeline.evaluation.scores import PROBE_LIMIT, evaluate, warmed_up
from pipeline.figures.pictures import draw_curves, draw_neighbors
from pipeline.models.backbones import export_backbone
from pipeline.running.environment import environment, in_words
from pipeline.running.ranks import shared
from pipeline.running.seeds import seed_of
from pipeline.training.health import warnings_of
from pipeline.training.report import Row, table
from pipeline.training.settings import Settings
from pipeline.training.trainer import Trainer

RAW_LIMIT = 10_000  # maximum number of training images to evaluate raw pixels with: every pixel is a feature
SHOWN_QUERIES, SHOWN_NEIGHBORS, GALLERY = 8, 5, 5_000


def add_rows_before(trainer: Trainer) -> None:
    """Record the baselines before training: rows of the table (raw pixels only for small sets), and the neighbors.

    The rows are left out with ``--skip-baselines``.
    """
    source, k = trainer.source, neighbors_of(trainer)
    if trainer.step:
        return
    rows: dict[str, dict[str, float]] = {}
    untrained = warmed_up(trainer.backbone, source, trainer.ranks)
    if source.has_val and source.size("train") <= PROBE_LIMIT and not trainer.settings.skip_baselines:
        if source.image_shape[1] <= 32 and source.size("train") <= RAW_LIMIT:
            rows["raw pixels"] = evaluate(torch.nn.Identity(), source, k, trainer.ranks)
        rows["untrained"] = evaluate(untrained, source, k, trainer.ranks)
    with shared(trainer.ranks):
        if trainer.leads:
            with source.bad.tolerated():  # an unreadable image in a picture must not end the run
                trainer.notes["untrained_neighbors"] = find_neighbors(trainer, untrained)
    trainer.notes["before"] = rows


def rows_after(trainer: Trainer) -> dict[str, float]:
    """Return the table's row for the trained encoder; empty if there are no test images."""
    if not trainer.source.has_val:
        return {}
    return evaluate(trainer.backbone, trainer.source, neighbors_of(trainer), trainer.ranks)


def neighbors_of(trainer: Trainer) -> int:
    """Return the number of neighbors k for which purity is measured."""
    return min(max(trainer.settings.k, 5), trainer.source.size("train"))


def report(trainer: Trainer, folder: Path, after: dict[str, float], seconds: float, steps: int) -> None:
    """Print the table, and write the pictures, the weights and the record."""
    s, source = trainer.settings, trainer.source
    name, title = name_of(s), title_of(trainer)
    export(trainer, folder / "backbone.safetensors")
    found_with = environment(trainer.device)
    draw_curves(folder / "curves.png", trainer.history, title)
    last = trainer.history[-1]
    print(f"\n{steps:,} steps in {seconds:.0f} s; in the last epoch {last['images_per_second']:.0f} images/s, ", end="")
    print(f"{last['data_share']:.1%} of the time waiting for data, {last['search_share']:.1%} in the search")
    rows = dict(trainer.notes["before"])
    if after:
        rows[name] = after
        print(f"\n{table(rows)}\n")
        record = {
            "settings": asdict(s),
            **found_with,
            "seconds_of_this_session": round(seconds, 1),
            "rows": rows,
        }
        (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    picture(trainer, folder / "neighbors.png", title)
    if after or not source.has_val:
        print(verdict(rows, name, last, with_labels=s.same_label))


def export(trainer: Trainer, path: Path) -> None:
    """Write the backbone, with the metadata that imagenet_eval.py needs."""
    s = trainer.settings
    facts = trainer.source.facts
    export_backbone(trainer.backbone, path, arch=s.arch, dataset=s.dataset, image_size=s.image_size, **facts)


def redraw_curves(trainer: Trainer, folder: Path) -> None:
    """Draw the curves of a run in progress. A failure only prints a warning: a picture must not end a run."""
    try:
        if trainer.history:
            draw_curves(folder / "curves.png", trainer.history, title_of(trainer))
    except OSError as error:
        print(f"\nwarning: {folder / 'curves.png'} could not be drawn: {error}", file=sys.stderr)


def title_of(trainer: Trainer) -> str:
    """Return the title of a run's pictures."""
    s = trainer.settings
    return f"{name_of(s)} on {s.dataset}, seed {s.seed}\n{in_words(environment(trainer.device))}"


def name_of(settings: Settings) -> str:
    """Return what the method is called in the table."""
    return "BYOL" if settings.method == "byol" else f"MSF, k = {settings.k}"


def picture(trainer: Trainer, path: Path, title: str) -> None:
    """Draw the queries' neighbors before and after training."""
    source = trainer.source
    queries, _ = shown(source)
    images, labels = gather(source, "val" if source.has_val else "train", queries)
    rows = []
    # Runs started by version 0.2.0 have the neighbors after the first epoch; without either, only the last are shown.
    titles = {"untrained_neighbors": "before training", "first_neighbors": "after epoch 1"}
    ends = [(title, trainer.notes[key]) for key, title in titles.items() if key in trainer.notes][:1]
    ends.append((f"after epoch {trainer.total_epochs}", find_neighbors(trainer, trainer.backbone)))
    for when, found in ends:
        flat, found_labels = gather(source, "train", [place for places in found for place in places])
        pairs = found_labels.view(len(found), -1).tolist()
        right = [
            [None if UNKNOWN in (one, other) else one == other for other in others]
            for one, others in zip(labels.tolist(), pairs, strict=True)
        ]
        shape = (len(found), len(found[0]), *source.displayable(flat).shape[1:])
        rows.append({"title": when, "images": source.displayable(flat).reshape(shape), "right": right})
    draw_neighbors(path, source.displayable(images), rows, f"Queries and their nearest training images: {title}")


def find_neighbors(trainer: Trainer, backbone: torch.nn.Module) -> list[list[int]]:
    """Return, for a few fixed queries, the indices of their nearest images in a fixed gallery of training images."""
    source = trainer.source
    queries, gallery = shown(source)
    wanted = (("val" if source.has_val else "train", queries), ("train", gallery))
    (query_features, _), (gallery_features, labels) = (
        [torch.cat(parts) for parts in zip(*features_of(backbone, source.images(split, chosen)), strict=True)]
        for split, chosen in wanted
    )
    gallery = [place for place, label in zip(gallery, labels.tolist(), strict=True) if label != UNREADABLE]
    query_features, gallery_features = (
        torch.nn.functional.normalize(features, dim=1)
        for features in (query_features, gallery_features[labels != UNREADABLE])
    )
    n = min(SHOWN_NEIGHBORS, len(gallery))
    _, index = find_backend("auto", trainer.device).topk(query_features, gallery_features, n)
    return [[gallery[place] for place in places] for places in index.tolist()]


def shown(source: DataSource) -> tuple[list[int], list[int]]:
    """Return the indices of the queries and of the gallery: the same at every epoch, and without overlap."""
    generator = torch.Generator().manual_seed(seed_of(0))
    order = torch.randperm(source.size("train"), generator=generator).tolist()
    if source.has_val:
        queries = torch.randperm(source.size("val"), generator=generator).tolist()[:SHOWN_QUERIES]
        return queries, order[:GALLERY]
    count = min(SHOWN_QUERIES, len(order) // 2)
    return order[:count], order[count : count + GALLERY]


def gather(source: DataSource, split: str, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the evaluation images and labels at these indices; an unreadable image is black and labeled UNKNOWN."""
    parts = list(source.images(split, places))
    labels = torch.cat([labels.cpu() for _, labels in parts])
    return torch.cat([images.cpu() for images, _ in parts]), labels.clamp(min=UNKNOWN)


def verdict(rows: dict[str, dict[str, float]], name: str, last: Row, *, with_labels: bool = False) -> str:
    """Return one sentence about the result, or the warnings; ``with_labels``: whether labels restrict the neighbors."""
    how = "with labels" if with_labels else "without labels"
    if warnings := warnings_of(last):
        return "\n".join(f"warning: {warning}" for warning in warnings)
    after = rows.get(name, {})
    if "one_label" in after:
        others = " and ".join(f"{row['one_label']:.1%} ({title})" for title, row in rows.items() if title != name)
        return f"{name}, trained {how}: {after['one_label']:.1%} with one label per class" + (
            f", against {others}." if others else "."
        )
    if after:
        return f"{name}: 20-NN accuracy on the test images is {after['nn20']:.1%}, learned {how}."
    ends = f"the loss is {last['loss']:.3f} and the spread {last['spread']:.2f}"
    return f"{name}: {ends}; no labeled test images to evaluate on."
