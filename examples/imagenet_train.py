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
Labels serve purity and evaluation alone, unless --same-label is given; a folder of images without labels works.
"""

from training import interrupts

if __name__ == "__main__":
    interrupts.leave_on_interrupt()

import contextlib
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from msf_core.distributed import Ranks
from msf_core.search import find_backend
from training.bad_images import LIST, write_list
from training.check import check_images
from training.checkpoint import check_sharded_checkpoints, load_checkpoint, load_shards, save_checkpoint
from training.data import UNKNOWN, UNREADABLE, BadImages, DataSource, Share, open_source, seed_of
from training.ending import OUT_OF_MEMORY, WRONG_INPUT, status_of, telling
from training.evaluation import PROBE_LIMIT, evaluate, nearest_neighbours, warmed_up
from training.features import features_of
from training.flags import writable_folder
from training.health import warnings_of
from training.lock import FolderLock
from training.loggers import Logger, check_logger, open_logger
from training.models import export_backbone, stem_of
from training.pictures import draw_curves, draw_neighbors
from training.ranks import joined, may_restart, restarted, shared
from training.report import (
    Row,
    environment,
    in_words,
    keep_losses,
    read_losses,
    table,
    write_csv,
    write_losses,
    written,
)
from training.scanning import printable
from training.settings import (
    Settings,
    build_parser,
    check_division,
    check_source,
    complete,
    is_old,
    new_run_folder,
    resumed,
)
from training.trainer import STATE, Diverged, StopRequest, Trainer

PROGRAM = "imagenet_train.py"
RAW_LIMIT = 10_000  # training images up to which raw pixels are evaluated: every pixel is a feature
SHOWN_QUERIES, SHOWN_NEIGHBORS, GALLERY = 8, 5, 5_000
REDRAW = 60.0  # seconds between drawings of curves.png, each of which takes one or two


def main(arguments: list[str] | None = None) -> int:
    """Run the script, here or in a notebook or a thread; return its exit status.

    Args:
        arguments: the flags; None are those of the command line.
    """
    return status_of(PROGRAM, lambda: train(arguments))


def train(arguments: list[str] | None) -> int:
    """Do what the flags say; return the exit status.

    Raises:
        SystemExit: after --help, and after an error, which has been told.
        LostRank: a rank does not answer.
    """
    title, _, examples, *_ = (__doc__ or "\n\n\n\n").split("\n\n")
    parser = build_parser(title, f"examples:\n{examples}")
    parser.prog = PROGRAM  # in a notebook the program is another
    given = vars(parser.parse_args(arguments))
    check_alone = given.pop("check_images", False)
    timeout = given.get("timeout", Settings.timeout)
    with ExitStack() as stack:
        with telling(PROGRAM, kinds=WRONG_INPUT):
            ranks, device = stack.enter_context(joined(given.get("device", Settings.device), timeout))
        with telling(PROGRAM, ranks, WRONG_INPUT):
            if check_alone:
                return check_images(source_of(settings_of(given, ranks)[0], ranks, device), ranks)
            # Where torchrun starts it again on another machine, a file server may not yet know that the first one died.
            lock = stack.enter_context(FolderLock(patience=timeout / 2 if restarted() else 0))
            trainer, folder = prepare(given, ranks, device, lock)
        stop = stack.enter_context(StopRequest())
        with telling(PROGRAM, ranks, OUT_OF_MEMORY, status=1):
            return run(trainer, folder, stop)


def prepare(
    given: dict[str, Any], ranks: Ranks, device: torch.device, lock: FolderLock | None = None
) -> tuple[Trainer, Path]:
    """Return the trainer, at its start or where the run to resume was, and the folder of the run.

    Args:
        given: the flags that were given.
        ranks: those that take part.
        device: of this one.
        lock: keeps other runs out of the folder, for as long as it is held.

    Raises:
        ValueError, ImportError, RuntimeError, OSError: on all ranks, where it goes wrong on one.
    """
    with shared(ranks):
        path = checkpoint_of(given)
        folder = folder_of(given, path)
        if ranks.rank == 0 and folder is not None:
            writable_folder("--out" if given.get("out") else "--resume", folder)
            if FolderLock.is_in(folder) or has_checkpoint(folder):
                occupy(folder, path, lock)
        settings, path, state = settings_of(given, ranks)
        if ranks.rank == 0:
            check_logger(settings.logger)
        check_division(settings, ranks.size)
        if settings.bank_layout == "sharded" and ranks.size > 1:
            check_sharded_checkpoints()
        source = source_of(settings, ranks, device)
        check_source(settings, source)
    if ranks.size > 1:  # one that does not see the checkpoint would begin anew
        ranks.agree("prepare", same={"step to go on from": -1 if state is None else int(state["step"])})
    trainer = Trainer(settings, source, device, ranks)
    if state is not None and path is not None:
        load_shards(path, state, trainer.criterion.state_dict())
        trainer.load_state_dict(state)
    with shared(ranks):
        chosen = [""]
        if ranks.rank == 0:
            folder = new_run_folder(settings.dataset) if folder is None else folder
            occupy(folder, path, lock)
            keep_losses(folder / "losses.csv", trainer.step)
            (folder / "config.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
            chosen = [str(folder)]
    if ranks.size > 1:
        dist.broadcast_object_list(chosen)
    if ranks.rank == 0 and state is not None and is_old(state["settings"]) and settings.dataset != "digits":
        print(
            "the run was begun by version 0.2.0 or older: from here on, its views are other ones than they were there"
        )
    return trainer, Path(chosen[0])


def settings_of(given: dict[str, Any], ranks: Ranks) -> tuple[Settings, Path | None, dict[str, Any] | None]:
    """Return the settings of the run, and the checkpoint to go on from with its content, if there is one."""
    path = checkpoint_of(given)
    state = None if path is None else load_checkpoint(path, STATE, ranks)
    return complete(given) if state is None else resumed(state["settings"], given), path, state


def source_of(settings: Settings, ranks: Ranks, device: torch.device) -> DataSource:
    """Return the images of the run, this rank's part of each step."""
    return open_source(
        settings.dataset,
        settings.data,
        image_size=settings.image_size,
        augmentation=settings.augmentation,
        blur=settings.blur,
        share=Share(settings.batch_size, settings.accumulate, ranks.rank, ranks.size),
        workers=settings.workers,
        seed=settings.seed,
        device=device,
        val_split=settings.val_split,
        bad=BadImages(settings.on_bad_image),
    )


def checkpoint_of(given: dict[str, Any]) -> Path | None:
    """Return the checkpoint to go on from: the one of --resume, by its file or its folder, or the one in --out.

    Raises:
        ValueError: there is none, or a run that may be restarted has no --out to find its checkpoint in.
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
    path = Path(resume) / "checkpoint.pt" if Path(resume).is_dir() else Path(resume)
    if not path.is_file():
        raise ValueError(f"--resume {resume}: no checkpoint at {path}")
    return path


def folder_of(given: dict[str, Any], checkpoint: Path | None) -> Path | None:
    """Return the folder of the run; None is a new one below runs/."""
    if given.get("out"):
        return Path(given["out"])
    return None if checkpoint is None else checkpoint.parent


def occupy(folder: Path, checkpoint: Path | None, lock: FolderLock | None) -> None:
    """Make the folder of the run, unless it is there, and lock it.

    Args:
        folder: of the run.
        checkpoint: that the run goes on from.
        lock: to take.

    Raises:
        ValueError: another run is there, or was and has left a checkpoint; or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.take(folder)
    except OSError as error:
        raise ValueError(f"--out: nothing can be written to {folder}: {error.strerror or error}") from None
    other = checkpoint is None or checkpoint.parent.resolve() != folder.resolve()
    if other and has_checkpoint(folder):
        raise ValueError(f"{folder} holds a run: go on with --resume {folder}, or choose another --out")


def run(trainer: Trainer, folder: Path, stop: StopRequest) -> int:
    """Train, and report; return the exit status. With several ranks, the first of them reports."""
    source, settings = trainer.source, trainer.settings
    logger, drawn = Logger(), time.monotonic()
    reported = trainer.step == trainer.total_steps and (folder / "neighbors.png").exists()
    try:
        with shared(trainer.ranks):
            if trainer.leads:
                announce(trainer, folder)
                logger = open_logger(folder, trainer.step, asdict(settings), trainer.notes)
                catch_up(logger, trainer, folder)
    except RuntimeError as error:
        if trainer.leads:
            print(f"error: {error}", file=sys.stderr)
        return 2

    def after_epoch(row: Row) -> None:
        nonlocal drawn
        last, every = trainer.step == trainer.total_steps, settings.eval_every
        due = every and (row["epoch"] == 1 or not row["epoch"] % every)
        if source.has_val and not trainer.stopped and not last and due:
            row |= nearest_neighbours(trainer.backbone, source, trainer.ranks)
        with shared(trainer.ranks):
            log(logger, trainer)
            if trainer.leads:
                logger.epoch(row["step"], numbers_of(row))
                if settings.keep_every and (row["epoch"] == 1 or last or not row["epoch"] % settings.keep_every):
                    export(trainer, folder / f"backbone-epoch-{row['epoch']:04d}.safetensors")
        checkpoint_due = last or row["epoch"] % settings.checkpoint_every == 0
        if checkpoint_due:
            save(trainer, folder, logger)
        if trainer.leads and not last and (due or checkpoint_due) and time.monotonic() - drawn > REDRAW:
            redraw_curves(trainer, folder)
            drawn = time.monotonic()

    started, first_step = time.perf_counter(), trainer.step
    problem = None
    with contextlib.closing(logger):
        try:
            add_rows_before(trainer)
            trainer.train(stop, after_epoch, lambda: log(logger, trainer))
        except OSError as error:  # an unreadable image, a reading process that has ended
            problem = error
        except Diverged as error:  # a checkpoint of this would take the place of a sound one
            if trainer.leads:
                kept = "; the last checkpoint is from before" if has_checkpoint(folder) else ""
                print(f"\nerror: {error}{kept}", file=sys.stderr)
            return 1
        if problem is not None or trainer.step < trainer.total_steps:
            saved = save(trainer, folder, logger)
            if trainer.leads:
                redraw_curves(trainer, folder)
                then = f"go on with --resume {folder}" if has_checkpoint(folder) else "there is no checkpoint"
                print(f"\nstopped after step {trainer.step} of {trainer.total_steps}; {then}")
                if problem is not None:
                    print(f"error: {problem}", file=sys.stderr)
                name_bad_images(trainer, folder)
            return 1 if problem is not None or not saved else 128 + trainer.stopped
        rows: dict[str, float] = {}
        try:
            rows = rows_after(trainer)
        except OSError as error:  # what was trained is not lost by an image that it is tested on
            problem = error
        evaluated = {name: value for name, value in rows.items() if name in ("nn1", "nn20")}
        if trainer.leads:
            trainer.history[-1] |= evaluated
        if not save(trainer, folder, logger):
            return 1
        if trainer.leads:
            with source.bad.tolerated():  # a picture is not worth a run
                report(trainer, folder, rows, time.perf_counter() - started, trainer.step - first_step)
            if logger.new or not reported:
                last = trainer.history[-1]
                final = {name: last[name] for name in ("loss", "spread", "rank") if name in last} | rows
                logger.result(trainer.step, evaluated, final, asdict(settings), [folder / "neighbors.png"])
    if trainer.leads:
        name_bad_images(trainer, folder)
        print(f"{folder}: {', '.join(written(folder))}")
        if problem is not None:
            again = f"imagenet_eval.py knn {folder}, or imagenet_train.py --resume {folder}"
            print(
                f"error: the encoder is trained, its evaluation failed: {problem}; repeat it: {again}", file=sys.stderr
            )
    return 0 if problem is None else 1


def name_bad_images(trainer: Trainer, folder: Path) -> None:
    """Say how many images could not be read, and where they are named."""
    if found := trainer.notes.get("bad_images"):
        print(f"{len(found):,} images could not be read: {folder / LIST} names them")


def has_checkpoint(folder: Path) -> bool:
    """Return whether there is one to go on from."""
    return (folder / "checkpoint.pt").exists()


def save(trainer: Trainer, folder: Path, logger: Logger | None = None) -> bool:
    """Write the checkpoint, the metrics, and what is logged; return whether that worked. All ranks call it.

    A run does not end because a disk is full: the last whole checkpoint is there, and the next one may work.
    """
    before = trainer.notes.get("bad_images", {})
    found = before | trainer.source.bad.of_all(trainer.ranks)
    if found:
        trainer.notes["bad_images"] = found
    losses, state = trainer.average_losses(), trainer.state_dict()
    try:
        with shared(trainer.ranks):
            if trainer.leads:
                if found:
                    write_list(folder / LIST, found)
                if new := sorted(found.keys() - before.keys()):
                    others = f" and {len(new) - 1:,} others" if len(new) > 1 else ""
                    said = f"cannot read {printable(new[0])}{others}, did without: see {folder / LIST}"
                    tqdm.write(f"warning: {said}", file=sys.stderr)
                # losses first: what a checkpoint does not know of, a resumed run drops
                if logger is not None:
                    log_losses(logger, trainer, losses, trainer.step)
                    logger.flush()
                write_losses(folder / "losses.csv", losses, trainer.step)
                trainer.losses_written()
                write_csv(folder / "metrics.csv", trainer.history)
        save_checkpoint(folder / "checkpoint.pt", state, trainer.ranks)
    except OSError as error:
        if trainer.leads:
            kept = "an earlier checkpoint is kept" if has_checkpoint(folder) else "there is no checkpoint"
            print(f"\nwarning: {error}; {kept}", file=sys.stderr)
        return False
    return True


def log(logger: Logger, trainer: Trainer) -> None:
    """Log the loss and the learning rate of every step since the last time; all ranks call it."""
    losses = trainer.average_losses()
    if trainer.leads:
        log_losses(logger, trainer, losses, trainer.step)


def log_losses(logger: Logger, trainer: Trainer, losses: list[float], last_step: int) -> None:
    """Log those of the losses, the last of them of ``last_step``, that have not been logged."""
    steps = range(max(logger.last_step, last_step - len(losses)), last_step)
    if steps:
        logger.last_step = steps.start
        logger.steps(losses[-len(steps) :], [trainer.lr(step) for step in steps])


def catch_up(logger: Logger, trainer: Trainer, folder: Path) -> None:
    """Log what the run has come to so far, if it is resumed with a logger that it did not have."""
    if logger.new and trainer.step:
        losses = read_losses(folder / "losses.csv")
        first = trainer.step - len(losses)
        for row in trainer.history:
            log_losses(logger, trainer, losses[: max(0, row["step"] - first)], row["step"])
            logger.epoch(row["step"], numbers_of(row))
        log_losses(logger, trainer, losses, trainer.step)


def numbers_of(row: Row) -> dict[str, float]:
    """Return an epoch's metrics without those that say when it was, and without the rate, which is logged by steps."""
    return {name: value for name, value in row.items() if name not in ("epoch", "step", "lr")}


def redraw_curves(trainer: Trainer, folder: Path) -> None:
    """Draw the curves of a run that is not at its end; a picture is not worth a run."""
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


def rows_after(trainer: Trainer) -> dict[str, float]:
    """Return the table's last row: what the trained encoder is worth; nothing where there is nothing to test on."""
    if not trainer.source.has_val:
        return {}
    return evaluate(trainer.backbone, trainer.source, neighbors_of(trainer), trainer.ranks)


def neighbors_of(trainer: Trainer) -> int:
    """Return how many of its nearest an image's purity is measured with."""
    return min(max(trainer.settings.k, 5), trainer.source.size("train"))


def announce(trainer: Trainer, folder: Path) -> None:
    """Say what will happen."""
    s, source = trainer.settings, trainer.source
    where = f"{trainer.device}" if trainer.ranks.size == 1 else f"{trainer.ranks.size} ranks of {trainer.device.type}"
    what = "BYOL (k = 1, no bank)" if s.method == "byol" else f"MSF: k = {s.k}, a bank of {s.bank_size:,} rows"
    labels = "with labels, for purity and evaluation" if source.has_val else "with labels, for purity alone"
    labels = labels if source.has_labels else "without labels: no evaluation"
    if s.same_label:
        labels = "with labels, which choose the neighbors"
    stem = " with the stem for small images" if stem_of(s.stem, s.arch, s.image_size) == "small" else ""
    for line in source.found.lines:
        print(line)
    print(f"{what}, views {s.augmentation}, {s.arch}{stem} on {where} in {trainer.precision}")
    readers = "" if source.workers is None else f", read by {source.workers} workers"
    if trainer.ranks.size > 1 and readers:
        readers += " a rank"
    length = f"{trainer.total_epochs} epochs, {trainer.total_steps:,} steps"
    print(f"{source.train_size:,} training images {labels}{readers}; {length}")
    print(f"writes to {folder}" + (f", from step {trainer.step}" if trainer.step else ""), flush=True)


def add_rows_before(trainer: Trainer) -> None:
    """Note what there is before training: the table's rows, raw pixels where they are few, and the first neighbors."""
    source, k = trainer.source, neighbors_of(trainer)
    if trainer.step:
        return
    rows: dict[str, dict[str, float]] = {}
    untrained = warmed_up(trainer.backbone, source, trainer.ranks)
    if source.has_val and source.size("train") <= PROBE_LIMIT:
        if source.image_shape[1] <= 32 and source.size("train") <= RAW_LIMIT:
            rows["raw pixels"] = evaluate(torch.nn.Identity(), source, k, trainer.ranks)
        rows["untrained"] = evaluate(untrained, source, k, trainer.ranks)
    with shared(trainer.ranks):
        if trainer.leads:
            with source.bad.tolerated():  # a picture is not worth a run
                trainer.notes["untrained_neighbors"] = find_neighbors(trainer, untrained)
    trainer.notes["before"] = rows


def find_neighbors(trainer: Trainer, backbone: torch.nn.Module) -> list[list[int]]:
    """Return for a few fixed queries the places of their nearest images in a fixed gallery of training images."""
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
    """Write the backbone, and what imagenet_eval.py needs to know of it."""
    s = trainer.settings
    facts = trainer.source.facts
    export_backbone(trainer.backbone, path, arch=s.arch, dataset=s.dataset, image_size=s.image_size, **facts)


def picture(trainer: Trainer, path: Path, title: str) -> None:
    """Draw the queries' neighbors before training and at its end."""
    source = trainer.source
    queries, _ = shown(source)
    images, labels = gather(source, "val" if source.has_val else "train", queries)
    rows = []
    # A run that version 0.2.0 began knows those after its first epoch; one without any shows the last alone.
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


def gather(source: DataSource, split: str, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the evaluation images and labels at these places; an unreadable image is black, its label UNKNOWN."""
    parts = list(source.images(split, places))
    labels = torch.cat([labels.cpu() for _, labels in parts])
    return torch.cat([images.cpu() for images, _ in parts]), labels.clamp(min=UNKNOWN)


def verdict(rows: dict[str, dict[str, float]], name: str, last: Row, *, with_labels: bool = False) -> str:
    """Say in one sentence what happened; ``with_labels`` where they chose the neighbors."""
    how = "with labels" if with_labels else "without labels"
    if warnings := warnings_of(last):
        return "\n".join(f"warning: {warning}" for warning in warnings)
    after = rows.get(name, {})
    if "one_label" in after:
        others = " and ".join(f"{row['one_label']:.1%} ({title})" for title, row in rows.items() if title != name)
        return f"{name}, trained {how}: {after['one_label']:.1%} with one label a class, against {others}."
    if after:
        return f"{name}: 20-NN accuracy on the test images is {after['nn20']:.1%}, learned {how}."
    ends = f"the loss is {last['loss']:.3f} and the spread {last['spread']:.2f}"
    return f"{name}: {ends}; no labeled test images to evaluate on."


if __name__ == "__main__":
    interrupts.run_script(main)
