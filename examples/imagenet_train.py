"""Train an encoder by Mean Shift (MSF, ICCV 2021), and show what its neighbours have become.

Needs: pip install 'msf_core[examples]'

    python examples/imagenet_train.py                    scikit-learn's digits on the CPU, about a minute
    python examples/imagenet_train.py --data IMAGENET    ResNet50 with the paper's settings (a GPU is advised)
    python examples/imagenet_train.py --dataset cifar10  ResNet18 for small images, all of them on the device
    python examples/imagenet_train.py --resume RUN       go on with a run that was stopped
    torchrun --nproc-per-node=8 examples/imagenet_train.py --data IMAGENET --batchnorm shuffle       on 8 GPUs

Where it departs from the paper: the target is updated after the step rather than before the next one (the same
sequence), one process drives one GPU, and on a GPU the encoders run in bfloat16 autocast, channels last. Views are
drawn on the device of the training, without rounding to 8 bits in between, and their blur is a Gaussian (Pillow's,
which the authors use, comes near one by box blurs).
--batch-size counts the images of all ranks.
Labels serve purity and evaluation alone; a folder of images without labels works.
"""

import contextlib
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from msf_core.distributed import Ranks
from msf_core.search import find_backend
from training.checkpoint import check_sharded_checkpoints, load_checkpoint, load_shards, save_checkpoint
from training.data import UNKNOWN, DataSource, Share, open_source, seed_of
from training.evaluation import PROBE_LIMIT, evaluate, nearest_neighbours, warmed_up
from training.features import features_of
from training.health import warnings_of
from training.models import export_backbone, stem_of
from training.peers import lost_touch, told_in_a_line
from training.ranks import joined, may_restart, restarted, shared
from training.report import (
    Row,
    draw_curves,
    draw_neighbors,
    environment,
    in_words,
    keep_losses,
    table,
    write_csv,
    write_losses,
)
from training.settings import Settings, build_parser, check_division, complete, make_run_folder, resumed
from training.trainer import STATE, Diverged, StopRequest, Trainer

RAW_LIMIT = 10_000  # training images up to which raw pixels are evaluated: every pixel is a feature
SHOWN_QUERIES, SHOWN_NEIGHBORS, GALLERY = 8, 5, 5_000


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = build_parser(__doc__.partition("\n\n")[0])
    given = vars(parser.parse_args(arguments))
    with ExitStack() as stack:
        stack.enter_context(told_in_a_line(parser.prog))
        try:
            ranks, device = stack.enter_context(
                joined(given.get("device", Settings.device), given.get("timeout", Settings.timeout))
            )
            trainer, folder = prepare(given, ranks, device)
        except (ValueError, ImportError, RuntimeError, OSError) as error:
            if lost_touch(error) and dist.is_initialized():
                raise  # `joined` finds out whom
            if int(os.environ.get("RANK", 0)) and str(error).startswith("rank "):
                return 2  # the rank that it befell says it, and so does rank 0
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        stop = stack.enter_context(StopRequest())
        return run(trainer, folder, stop)


def prepare(given: dict[str, Any], ranks: Ranks, device: torch.device) -> tuple[Trainer, Path]:
    """Return the trainer, at its start or where the run to resume was, and the folder of the run.

    Raises:
        ValueError, ImportError, RuntimeError, OSError: on all ranks, where it goes wrong on one.
    """
    with shared(ranks):
        path = checkpoint_of(given)
        state = None if path is None else load_checkpoint(path, STATE, ranks)
        settings = complete(given) if state is None else resumed(state["settings"], given)
        check_division(settings, ranks.size)
        if settings.bank_layout == "sharded" and ranks.size > 1:
            check_sharded_checkpoints()
        source = open_source(
            settings.dataset,
            settings.data,
            image_size=settings.image_size,
            augmentation=settings.augmentation,
            blur=settings.blur,
            share=Share(settings.batch_size, settings.accumulate, ranks.rank, ranks.size),
            workers=settings.workers,
            seed=settings.seed,
            device=device,
        )
    if ranks.size > 1:  # one that does not see the checkpoint would begin anew
        ranks.agree("prepare", same={"step to go on from": -1 if state is None else int(state["step"])})
    trainer = Trainer(settings, source, device, ranks)
    with shared(ranks):
        chosen = [str(folder_of(given, path, settings)) if ranks.rank == 0 else ""]
    if ranks.size > 1:
        dist.broadcast_object_list(chosen)
    folder = Path(chosen[0])
    if state is not None and path is not None:
        load_shards(path, state, trainer.criterion.state_dict())
        trainer.load_state_dict(state)
    if ranks.rank == 0:
        keep_losses(folder / "losses.csv", trainer.step)
        (folder / "config.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    return trainer, folder


def checkpoint_of(given: dict[str, Any]) -> Path | None:
    """Return the checkpoint to go on from: the one of --resume, by its file or its folder, or the one in --out.

    Raises:
        ValueError: a run that may be restarted has no --out to find its checkpoint in.
    """
    resume = given.get("resume", "auto" if restarted() else "")
    if may_restart() and not given.get("out") and resume in ("", "auto"):
        raise ValueError("torchrun --max-restarts needs --out DIR: a restarted run looks for its checkpoint there")
    if resume == "auto":
        if not given.get("out"):
            raise ValueError("--resume auto needs --out DIR")
        path = Path(given["out"]) / "checkpoint.pt"
        return path if path.exists() else None
    if not resume:
        return None
    path = Path(resume)
    return path / "checkpoint.pt" if path.is_dir() else path


def folder_of(given: dict[str, Any], checkpoint: Path | None, settings: Settings) -> Path:
    """Return the folder of the run, which exists then."""
    if checkpoint is None:
        return make_run_folder(settings.out, settings.dataset)
    old = checkpoint.parent
    new = Path(given.get("out", old))
    return old if new.resolve() == old.resolve() else make_run_folder(str(new), settings.dataset)


def run(trainer: Trainer, folder: Path, stop: StopRequest) -> int:
    """Train, and report; return the exit status. With several ranks, the first of them reports."""
    source, settings = trainer.source, trainer.settings
    writer = None
    if trainer.leads:
        announce(trainer, folder)
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=trainer.step + 1 if trainer.step else 0)

    def after_epoch(row: Row) -> None:
        last, every = trainer.step == trainer.total_steps, settings.eval_every
        due = every and (row["epoch"] == 1 or not row["epoch"] % every)
        if source.has_val and not trainer.stopped and not last and due:
            row |= nearest_neighbours(trainer.backbone, source, trainer.ranks)
        with shared(trainer.ranks):
            if writer is not None:
                if "first_neighbors" not in trainer.notes:
                    trainer.notes["first_neighbors"] = find_neighbors(trainer)
                log(writer, row)
                if settings.keep_every and (row["epoch"] == 1 or last or not row["epoch"] % settings.keep_every):
                    export(trainer, folder / f"backbone-epoch-{row['epoch']:04d}.safetensors")
        if last or row["epoch"] % settings.checkpoint_every == 0:
            save(trainer, folder)

    started, first_step = time.perf_counter(), trainer.step
    problem = None
    with contextlib.closing(writer) if writer is not None else contextlib.nullcontext():
        try:
            add_rows_before(trainer)
            trainer.train(stop, after_epoch)
        except OSError as error:  # an unreadable image
            problem = error
        except Diverged as error:  # a checkpoint of this would take the place of a sound one
            if trainer.leads:
                print(f"\nerror: {error}", file=sys.stderr)
            return 1
        if problem is not None or trainer.step < trainer.total_steps:
            saved = save(trainer, folder)
            if trainer.leads:
                print(f"\nstopped after step {trainer.step} of {trainer.total_steps}; go on with --resume {folder}")
                if problem is not None:
                    print(f"error: {problem}", file=sys.stderr)
            return 1 if problem is not None or not saved else 128 + trainer.stopped
        rows = rows_after(trainer)
        with shared(trainer.ranks):
            if writer is not None:
                trainer.history[-1] |= {name: value for name, value in rows.items() if name in ("nn1", "nn20")}
                log(writer, trainer.history[-1])
    if not save(trainer, folder):
        return 1
    if trainer.leads:
        report(trainer, folder, rows, time.perf_counter() - started, trainer.step - first_step)
    return 0


def save(trainer: Trainer, folder: Path) -> bool:
    """Write the checkpoint and the metrics; return whether that worked. All ranks call it.

    A run does not end because a disk is full: the last whole checkpoint is there, and the next one may work.
    """
    losses, state = trainer.average_losses(), trainer.state_dict()
    try:
        with shared(trainer.ranks):
            if trainer.leads:  # losses first: what a checkpoint does not know of, a resumed run drops
                write_losses(folder / "losses.csv", losses, trainer.step)
                trainer.losses_written()
                write_csv(folder / "metrics.csv", trainer.history)
        save_checkpoint(folder / "checkpoint.pt", state, trainer.ranks)
    except OSError as error:
        if trainer.leads:
            print(f"\nwarning: {error}; an earlier checkpoint is kept", file=sys.stderr)
        return False
    return True


def log(writer: SummaryWriter, row: Row) -> None:
    """Write an epoch's metrics to TensorBoard."""
    for name, value in row.items():
        writer.add_scalar(name, value, row["step"])


def rows_after(trainer: Trainer) -> dict[str, float]:
    """Return the table's last row: what the trained encoder is worth; nothing where there is nothing to test on."""
    if not trainer.source.has_val:
        return {}
    return evaluate(trainer.backbone, trainer.source, max(trainer.settings.k, 5), trainer.ranks)


def announce(trainer: Trainer, folder: Path) -> None:
    """Say what will happen."""
    s, source = trainer.settings, trainer.source
    where = f"{trainer.device}" if trainer.ranks.size == 1 else f"{trainer.ranks.size} ranks of {trainer.device.type}"
    what = "BYOL (k = 1, no bank)" if s.method == "byol" else f"MSF: k = {s.k}, a bank of {s.bank_size:,} rows"
    labels = "with labels, for purity and evaluation" if source.has_labels else "without labels: no evaluation"
    stem = " with the stem for small images" if stem_of(s.stem, s.arch, s.image_size) == "small" else ""
    print(f"{what}, views {s.augmentation}, {s.arch}{stem} on {where} in {trainer.precision}")
    readers = "" if source.workers is None else f", read by {source.workers} workers"
    if trainer.ranks.size > 1 and readers:
        readers += " a rank"
    length = f"{trainer.total_epochs} epochs, {trainer.total_steps:,} steps"
    print(f"{source.train_size:,} training images {labels}{readers}; {length}")
    print(f"writes to {folder}" + (f", from step {trainer.step}" if trainer.step else ""))


def add_rows_before(trainer: Trainer) -> None:
    """Note the table's first rows, once: raw pixels where they are few, and the untrained encoder."""
    source, k = trainer.source, max(trainer.settings.k, 5)
    if trainer.step:
        return
    rows: dict[str, dict[str, float]] = {}
    if source.has_val and source.size("train") <= PROBE_LIMIT:
        if source.image_shape[1] <= 32 and source.size("train") <= RAW_LIMIT:
            rows["raw pixels"] = evaluate(torch.nn.Identity(), source, k, trainer.ranks)
        rows["untrained"] = evaluate(warmed_up(trainer.backbone, source, trainer.ranks), source, k, trainer.ranks)
    trainer.notes["before"] = rows


def find_neighbors(trainer: Trainer) -> list[list[int]]:
    """Return for a few fixed queries the places of their nearest images in a fixed gallery of training images."""
    source = trainer.source
    queries, gallery = shown(source)
    wanted = (("val" if source.has_val else "train", queries), ("train", gallery))
    query_features, gallery_features = (
        torch.nn.functional.normalize(
            torch.cat([part for part, _ in features_of(trainer.backbone, source.images(split, chosen))]), dim=1
        )
        for split, chosen in wanted
    )
    n = min(SHOWN_NEIGHBORS, len(gallery))
    _, index = find_backend("auto", trainer.device).topk(query_features, gallery_features, n)
    return [[gallery[place] for place in places] for places in index.tolist()]


def shown(source: DataSource) -> tuple[list[int], list[int]]:
    """Return the places of the queries and of the gallery: the same at every epoch, apart from one another."""
    generator = torch.Generator().manual_seed(seed_of(0))
    order = torch.randperm(source.size("train"), generator=generator).tolist()
    if source.has_val:
        queries = torch.randperm(source.size("val"), generator=generator).tolist()[:SHOWN_QUERIES]
        return queries, order[:GALLERY]
    count = min(SHOWN_QUERIES, len(order) // 2)
    return order[:count], order[count : count + GALLERY]


def report(trainer: Trainer, folder: Path, after: dict[str, float], seconds: float, steps: int) -> None:
    """Print the table, write pictures, weights and the record."""
    s, source = trainer.settings, trainer.source
    name = "BYOL" if s.method == "byol" else f"MSF, k = {s.k}"
    export(trainer, folder / "backbone.safetensors")
    found_with = environment(trainer.device)
    title = f"{name} on {s.dataset}, seed {s.seed}\n{in_words(found_with)}"
    draw_curves(folder / "curves.png", trainer.history, title)
    last = trainer.history[-1]
    print(f"\n{steps:,} steps in {seconds:.0f} s; in the last epoch {last['images_per_second']:.0f} images/s, ", end="")
    print(f"{last['data_share']:.1%} of the time waiting for data, {last['search_share']:.1%} in the search")
    rows = dict(trainer.notes["before"])
    if source.has_val:
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
    print(verdict(rows, name, last))
    files = "checkpoint.pt, backbone.safetensors, metrics.csv, losses.csv, tensorboard/, curves.png, neighbors.png"
    print(f"{folder}: {files}")


def export(trainer: Trainer, path: Path) -> None:
    """Write the backbone, and what imagenet_eval.py needs to know of it."""
    s = trainer.settings
    facts = trainer.source.facts
    export_backbone(trainer.backbone, path, arch=s.arch, dataset=s.dataset, image_size=s.image_size, **facts)


def picture(trainer: Trainer, path: Path, title: str) -> None:
    """Draw the queries' neighbours after the first and after the last epoch."""
    source = trainer.source
    queries, _ = shown(source)
    images, labels = gather(source, "val" if source.has_val else "train", queries)
    rows = []
    ends = [(1, trainer.notes["first_neighbors"]), (trainer.total_epochs, find_neighbors(trainer))]
    for epoch, found in ends:
        flat, found_labels = gather(source, "train", [place for places in found for place in places])
        pairs = found_labels.view(len(found), -1).tolist()
        right = [
            [None if UNKNOWN in (one, other) else one == other for other in others]
            for one, others in zip(labels.tolist(), pairs, strict=True)
        ]
        shape = (len(found), len(found[0]), *source.displayable(flat).shape[1:])
        rows.append(
            {"title": f"after epoch {epoch}", "images": source.displayable(flat).reshape(shape), "right": right}
        )
    draw_neighbors(path, source.displayable(images), rows, f"Queries and their nearest training images: {title}")


def gather(source: DataSource, split: str, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the evaluation images and labels at these places."""
    parts = list(source.images(split, places))
    return torch.cat([images.cpu() for images, _ in parts]), torch.cat([labels.cpu() for _, labels in parts])


def verdict(rows: dict[str, dict[str, float]], name: str, last: Row) -> str:
    """Say in one sentence what happened."""
    if warnings := warnings_of(last):
        return "\n".join(f"warning: {warning}" for warning in warnings)
    after = rows.get(name, {})
    if "one_label" in after:
        others = " and ".join(f"{row['one_label']:.1%} ({title})" for title, row in rows.items() if title != name)
        return f"{name}, trained without labels: {after['one_label']:.1%} with one label a class, against {others}."
    if after:
        return f"{name}: 20-NN accuracy on the test images is {after['nn20']:.1%}, learned without labels."
    return f"{name}: the loss is {last['loss']:.3f} and the spread {last['spread']:.2f}; no labels to evaluate with."


if __name__ == "__main__":
    sys.exit(main())
