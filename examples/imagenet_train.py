"""Train an encoder with Mean Shift (MSF, ICCV 2021), evaluate it, and draw its neighbors.

Needs, in a clone: pip install -e '.[examples]'

    python examples/imagenet_train.py                    scikit-learn's digits on the CPU, a minute or more
    python examples/imagenet_train.py --data IMAGENET    ResNet50 with the paper's settings (use a GPU)
    python examples/imagenet_train.py --dataset cifar10  ResNet18 for small images, which are kept on the device
    python examples/imagenet_train.py --resume RUN       continue a run that was stopped
    torchrun --nproc-per-node=8 examples/imagenet_train.py --data IMAGENET --batchnorm shuffle       on 8 GPUs

Differences from the paper:

- The target is updated after the step, not before the next one, which gives the same sequence of updates.
- There is one process per GPU, and on a GPU the encoders run in bfloat16 autocast.
- Views are drawn on the training device, without rounding to 8 bits in between. Their blur is Gaussian; the authors use
  Pillow's, which approximates it by box blurs.

--batch-size is the number of images over all ranks. Labels are used only for purity and evaluation, unless --same-label
is given. A folder of images without labels works too.
"""

from pipeline.running import interrupts

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
from pipeline.data.bad_images import LIST, BadImages, write_list
from pipeline.data.check import check_images
from pipeline.data.opening import open_source
from pipeline.data.scanning import printable
from pipeline.data.source import DataSource, Share
from pipeline.evaluation.scores import nearest_neighbors
from pipeline.models.backbones import stem_of
from pipeline.models.checkpoint import check_sharded_checkpoints, load_checkpoint, load_shards, save_checkpoint
from pipeline.running.ending import OUT_OF_MEMORY, WRONG_INPUT, status_of, telling
from pipeline.running.flags import writable_folder
from pipeline.running.ranks import joined, restarted, shared
from pipeline.training.folder import checkpoint_of, folder_of, has_checkpoint, new_run_folder, occupy
from pipeline.training.lock import FolderLock
from pipeline.training.loggers import Logger, check_logger, open_logger
from pipeline.training.report import Row, keep_losses, write_csv, write_losses, written
from pipeline.training.run_logging import catch_up, log, log_losses, numbers_of
from pipeline.training.settings import Settings, build_parser, check_division, check_source, complete, is_old, resumed
from pipeline.training.showing import add_rows_before, export, redraw_curves, report, rows_after
from pipeline.training.trainer import STATE, Diverged, StopRequest, Trainer

PROGRAM = "imagenet_train.py"
REDRAW = 60.0  # least seconds between drawings of curves.png, which take one or two seconds each


def main(arguments: list[str] | None = None) -> int:
    """Run the script, here or in a notebook or a thread; return its exit status.

    Args:
        arguments: the flags; None takes them from the command line.
    """
    return status_of(PROGRAM, lambda: train(arguments))


def train(arguments: list[str] | None) -> int:
    """Run the script with the given flags; return the exit status.

    Raises:
        SystemExit: after --help, and after an error, which has been printed.
        LostRank: if a rank does not answer.
    """
    title, _, examples, *_ = (__doc__ or "\n\n\n\n").split("\n\n")
    parser = build_parser(title, f"examples:\n{examples}")
    parser.prog = PROGRAM  # in a notebook, argparse would use another name
    given = vars(parser.parse_args(arguments))
    check_alone = given.pop("check_images", False)
    timeout = given.get("timeout", Settings.timeout)
    with ExitStack() as stack:
        with telling(PROGRAM, kinds=WRONG_INPUT):
            ranks, device = stack.enter_context(joined(given.get("device", Settings.device), timeout))
        with telling(PROGRAM, ranks, WRONG_INPUT):
            if check_alone:
                return check_images(source_of(settings_of(given, ranks)[0], ranks, device), ranks)
            # If torchrun restarts a run on another machine, the file server may still hold the dead process's lock.
            lock = stack.enter_context(FolderLock(patience=timeout / 2 if restarted() else 0))
            trainer, folder = prepare(given, ranks, device, lock)
            stop = stack.enter_context(StopRequest())
            logger = begin(trainer, folder)
        with telling(PROGRAM, ranks, OUT_OF_MEMORY, status=1):
            return run(trainer, folder, logger, stop)


def prepare(
    given: dict[str, Any], ranks: Ranks, device: torch.device, lock: FolderLock | None = None
) -> tuple[Trainer, Path]:
    """Return the trainer, new or with the state of the run to resume, and the folder of the run.

    Args:
        given: the flags that were given.
        ranks: all ranks of the run.
        device: the device of this rank.
        lock: keeps other runs out of the folder while it is held.

    Raises:
        ValueError, ImportError, RuntimeError, OSError: on all ranks, if one rank fails.
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
    if ranks.size > 1:  # a rank that does not find the checkpoint would start from scratch
        ranks.agree("prepare", same={"step to resume from": -1 if state is None else int(state["step"])})
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
        print("the run was started by version 0.2.0 or older: from now on, its views differ from those of that version")
    return trainer, Path(chosen[0])


def settings_of(given: dict[str, Any], ranks: Ranks) -> tuple[Settings, Path | None, dict[str, Any] | None]:
    """Return the settings of the run, and the path and content of the checkpoint to resume from, if there is one."""
    path = checkpoint_of(given)
    state = None if path is None else load_checkpoint(path, STATE, ranks)
    return complete(given) if state is None else resumed(state["settings"], given), path, state


def source_of(settings: Settings, ranks: Ranks, device: torch.device) -> DataSource:
    """Return the data source of the run, which yields this rank's part of each step."""
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


def begin(trainer: Trainer, folder: Path) -> Logger:
    """Print what the run will do, and return its logger, which writes nothing on ranks other than 0.

    Raises:
        ImportError, RuntimeError, OSError: on all ranks, if the logger cannot be opened.
    """
    logger = Logger()
    with shared(trainer.ranks):
        if trainer.leads:
            announce(trainer, folder)
            logger = open_logger(folder, trainer.step, asdict(trainer.settings), trainer.notes)
            catch_up(logger, trainer, folder)
    return logger


def run(trainer: Trainer, folder: Path, logger: Logger, stop: StopRequest) -> int:
    """Train and report; return the exit status. With several ranks, only the first reports."""
    source, settings = trainer.source, trainer.settings
    drawn = time.monotonic()
    reported = trainer.step == trainer.total_steps and (folder / "neighbors.png").exists()

    def after_epoch(row: Row) -> None:
        nonlocal drawn
        last, every = trainer.step == trainer.total_steps, settings.eval_every
        due = every and (row["epoch"] == 1 or not row["epoch"] % every)
        if source.has_val and not trainer.stopped and not last and due:
            row |= nearest_neighbors(trainer.backbone, source, trainer.ranks)
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
        except OSError as error:  # an unreadable image, or a worker that died
            problem = error
        except Diverged as error:  # do not overwrite a good checkpoint with this state
            if trainer.leads:
                kept = "; the last checkpoint is from before that" if has_checkpoint(folder) else ""
                print(f"\nerror: {error}{kept}", file=sys.stderr)
            return 1
        if problem is not None or trainer.step < trainer.total_steps:
            return stopped(trainer, folder, logger, problem)
        rows: dict[str, float] = {}
        try:
            rows = rows_after(trainer)
        except OSError as error:  # the trained weights must be saved even if a test image cannot be read
            problem = error
        evaluated = {name: value for name, value in rows.items() if name in ("nn1", "nn20")}
        if trainer.leads:
            trainer.history[-1] |= evaluated
        if not save(trainer, folder, logger):
            return 1
        if trainer.leads:
            with source.bad.tolerated():  # an unreadable image in a picture must not end the run
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
                f"error: the encoder is trained, but its evaluation failed: {problem}; repeat it with {again}",
                file=sys.stderr,
            )
    return 0 if problem is None else 1


def stopped(trainer: Trainer, folder: Path, logger: Logger, problem: OSError | None) -> int:
    """Save a run that was stopped by a signal or a problem, print how to resume it, and return the exit status."""
    saved = save(trainer, folder, logger)
    if trainer.leads:
        redraw_curves(trainer, folder)
        then = f"continue with --resume {folder}" if has_checkpoint(folder) else "there is no checkpoint"
        print(f"\nstopped after step {trainer.step} of {trainer.total_steps}; {then}")
        if problem is not None:
            print(f"error: {problem}", file=sys.stderr)
        name_bad_images(trainer, folder)
    return 1 if problem is not None or not saved else 128 + trainer.stopped


def name_bad_images(trainer: Trainer, folder: Path) -> None:
    """Print how many images could not be read, and the file that lists them."""
    if found := trainer.notes.get("bad_images"):
        print(f"{len(found):,} images could not be read: see {folder / LIST}")


def save(trainer: Trainer, folder: Path, logger: Logger | None = None) -> bool:
    """Write the checkpoint, the metrics and the log; return whether that worked. All ranks must call it.

    A full disk does not end a run: the last complete checkpoint is kept, and the next save may succeed.
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
                    said = f"cannot read {printable(new[0])}{others}, skipped: see {folder / LIST}"
                    tqdm.write(f"warning: {said}", file=sys.stderr)
                # write the losses first: a resumed run drops those that are newer than its checkpoint
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


def announce(trainer: Trainer, folder: Path) -> None:
    """Print the settings of the run."""
    s, source = trainer.settings, trainer.source
    where = f"{trainer.device}" if trainer.ranks.size == 1 else f"{trainer.ranks.size} ranks of {trainer.device.type}"
    what = "BYOL (k = 1, no bank)" if s.method == "byol" else f"MSF: k = {s.k}, a bank of {s.bank_size:,} rows"
    labels = "with labels, for purity and evaluation" if source.has_val else "with labels, for purity only"
    labels = labels if source.has_labels else "without labels: no evaluation"
    if s.same_label:
        labels = "with labels, which restrict the neighbors"
    stem = " with the stem for small images" if stem_of(s.stem, s.arch, s.image_size) == "small" else ""
    for line in source.found.lines:
        print(line)
    print(f"{what}, views {s.augmentation}, {s.arch}{stem} on {where} in {trainer.precision}")
    readers = "" if source.workers is None else f", read by {source.workers} workers"
    if trainer.ranks.size > 1 and readers:
        readers += " per rank"
    length = f"{trainer.total_epochs} epoch{'s' * (trainer.total_epochs != 1)}, {trainer.total_steps:,} steps"
    print(f"{source.train_size:,} training images {labels}{readers}; {length}")
    print(f"writes to {folder}" + (f", from step {trainer.step}" if trainer.step else ""), flush=True)


if __name__ == "__main__":
    interrupts.run_script(main)
