"""Training runs of `methods.py`. Each writes one JSON record; a run that has its record is not repeated.

A run that was stopped has no record and starts again from the beginning.
"""

import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.comparing.core import Method
from benchmarks.comparing.learners import METHODS, RAW_PIXELS, UNTRAINED
from benchmarks.comparing.recipe import Recipe, new_backbone, open_images
from benchmarks.measuring.measure import describe_environment
from msf_core.distributed import Ranks
from msf_core.schedules import cosine
from pipeline.data.source import DataSource
from pipeline.evaluation.scores import evaluate, nearest_neighbors, warmed_up

LAST = 100  # steps at the end whose mean loss is recorded
OF_THE_RUN = ("lr", "steps", "sweep_steps")  # fields of a recipe that the run sets itself
PRELOADED = ("torch", "torchvision.models", "lightly.loss", "lightly.models.modules", "sklearn.linear_model", "faiss")
LOOK_EVERY = 20  # steps between checks of the loss, each of which waits for the GPU


@dataclass(frozen=True)
class Run:
    """One run: everything that affects its results."""

    method: str
    lr: float
    steps: int
    seed: int
    validation: bool  # of the sweep: judged on a part of the training images
    recipe: Recipe

    @property
    def name(self) -> str:
        """What its record is called."""
        return name_of(vars(self))


@dataclass(frozen=True)
class Place:
    """Where runs happen; this does not affect their results."""

    folder: Path  # for the records
    data: str
    device: str
    workers: int
    images: dict[str, int]  # how many there are, from `counted`

    def record_of(self, run: Run) -> dict[str, Any] | None:
        """Return the record of a finished run, or None.

        Raises:
            ValueError: there is one for another recipe or other images.
        """
        path = self.path_of(run)
        if not path.exists():
            return None
        record: dict[str, Any] = json.loads(path.read_text())
        wanted = json.loads(json.dumps({**asdict(run)["recipe"], "images": self.images}))
        wanted = {name: value for name, value in wanted.items() if name not in OF_THE_RUN}
        found = {**record["run"]["recipe"], "images": record["images"]}
        if differing := [name for name in wanted if found.get(name) != wanted[name]]:
            name = differing[0]
            raise ValueError(
                f"{path} is a run with another {name}, {found.get(name)} instead of {wanted[name]}: "
                "choose another --out"
            )
        return record

    def path_of(self, run: Run) -> Path:
        """Return where the record of a run is or will be."""
        return self.folder / "runs" / f"{run.name}.json"


def name_of(run: dict[str, Any]) -> str:
    """Return what the record of a run is called, given the fields of a `Run`."""
    part = "-validation" if run["validation"] else ""
    return f"{run['method']}-lr-{run['lr']:g}-steps-{run['steps']}{part}-seed-{run['seed']}"


def unpack(place: Place) -> None:
    """Turn each line of a records.jsonl into the file of a run, if the folder has no runs yet.

    Raises:
        ValueError: a line is not a record.
    """
    path = place.folder / "records.jsonl"
    folder = place.folder / "runs"
    if folder.exists() or not path.exists():
        return
    records = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            records[name_of(record["run"])] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is not the record of a run: {error!r}") from error
    folder.mkdir()
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def counted(source: DataSource) -> dict[str, int]:
    """Return the numbers of images and classes, by which records of other images are recognized."""
    labels = source.labels("train")
    return {"train": len(labels), "val": source.size("val"), "classes": len(labels.unique())}


def finish(runs: list[Run], place: Place, jobs: int) -> None:
    """Do the runs that have no record yet, ``jobs`` at a time. If jobs > 1, each has its own process with one thread.

    Raises:
        RuntimeError: some failed; all others were finished.
    """
    missing = [run for run in dict.fromkeys(runs) if place.record_of(run) is None]
    if not missing:
        return
    (place.folder / "runs").mkdir(parents=True, exist_ok=True)
    total = sum(run.steps for run in missing)
    with tqdm(total=total, unit="step", mininterval=0.2 if sys.stderr.isatty() else 30.0) as bar:
        if jobs > 1:
            _finish_together(missing, place, jobs, bar)
            return
        for run in missing:
            bar.set_postfix_str(run.name)
            record(run, place, lambda: bar.update() and None)


def _finish_together(missing: list[Run], place: Place, jobs: int, bar: tqdm) -> None:
    server = "forkserver" in multiprocessing.get_all_start_methods()  # imports once; runs share no memory
    context: Any = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(list(PRELOADED))
    steps, problems = context.Value("q", 0), context.SimpleQueue()
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process imports its libraries
    on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the processes too
    waiting, running, said = deque(missing), list[tuple[Any, Run]](), list[str]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.popleft()
                process = context.Process(target=_in_process, args=(run, place, steps, problems))
                process.start()
                running.append((process, run))
            wait([process.sentinel for process, _ in running], timeout=0.5)
            for process, run in [pair for pair in running if not pair[0].is_alive()]:
                running.remove((process, run))
                if process.exitcode and problems.empty():
                    said.append(f"{run.name}: its process ended with status {process.exitcode}")
            while not problems.empty():
                said.append(problems.get())
            bar.update(steps.value - bar.n)
    finally:
        for process, _ in running:
            process.terminate()
        signal.signal(signal.SIGTERM, on_sigterm)
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    if said:
        raise RuntimeError("\n".join(said))


def _in_process(run: Run, place: Place, steps: Any, problems: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    torch.set_num_threads(1)

    def stepped() -> None:
        with steps.get_lock():
            steps.value += 1

    try:
        record(run, place, stepped)
    except Exception as error:
        problems.put(f"{run.name}: {type(error).__name__}: {error}")
        sys.exit(1)


def record(run: Run, place: Place, stepped: Callable[[], None]) -> None:
    """Do one run and write its record atomically."""
    found = do(run, place, stepped)
    path = place.path_of(run)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(path)


def do(run: Run, place: Place, stepped: Callable[[], None]) -> dict[str, Any]:
    """Train and evaluate; return the record."""
    device = torch.device(place.device)
    entry, recipe = METHODS[run.method], run.recipe
    source = open_images(
        recipe,
        place.data,
        entry.augmentation,
        seed=run.seed,
        device=device,
        validation=run.validation,
        workers=place.workers,
    )
    torch.manual_seed(run.seed)
    backbone, features = new_backbone(recipe, source.image_shape)
    backbone = backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    started = time.perf_counter()
    losses: list[float] = []
    if run.method == UNTRAINED:
        backbone = warmed_up(backbone, source, Ranks())
    elif run.method == RAW_PIXELS:
        backbone = nn.Identity()
    else:
        losses = fit(entry.build(backbone, features, recipe).to(device), source, run, stepped)
    trained = time.perf_counter()
    diverged = any(not math.isfinite(loss) for loss in losses)
    results: dict[str, float] = {}
    if not diverged and run.validation:
        results = nearest_neighbors(backbone, source, Ranks())
    elif not diverged:
        results = evaluate(backbone, source, recipe.k, Ranks())
    return {
        "run": asdict(run),
        "images": place.images,
        "results": results,
        "diverged": diverged,
        "loss": losses and sum(losses) / len(losses),
        "images_seen": run.steps * recipe.batch_size,
        "training_seconds": trained - started,
        "evaluation_seconds": time.perf_counter() - trained,
        "environment": describe_environment(device),
        "lightly": version("lightly"),
    }


def fit(method: Method, source: DataSource, run: Run, stepped: Callable[[], None]) -> list[float]:
    """Train to the last step, or until the loss is not finite; return the losses of the last steps."""
    optimizer = optimizer_of(method, run)
    rate = cosine(run.lr, 0.0, steps=run.steps)
    method.train()
    method.start(epoch_of(source, run, 0), source.train_size)
    last: deque[Tensor] = deque(maxlen=LAST)
    for step, (first, second, ids) in enumerate(itertools.islice(epochs_of(source, run), run.steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        last.append(step_of(method, optimizer, first, second, ids))
        stepped()
        if step % LOOK_EVERY == 0 and not math.isfinite(float(last[-1])):
            break
    return torch.stack(list(last)).tolist()


def optimizer_of(method: Method, run: Run) -> torch.optim.SGD:
    """Return SGD with weight decay for weights and without it for biases and BatchNorm."""
    weights = [weight for weight in method.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": run.recipe.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=run.lr, momentum=0.9)


def step_of(method: Method, optimizer: torch.optim.SGD, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
    """Do one step; return its loss, detached."""
    optimizer.zero_grad()
    loss = method.loss(first, second, ids)
    loss.backward()
    optimizer.step()
    method.after_step()
    return loss.detach()


def epochs_of(source: DataSource, run: Run) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (target views, online views, ids), epoch after epoch without end."""
    for epoch in itertools.count():
        yield from epoch_of(source, run, epoch)


def epoch_of(source: DataSource, run: Run, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (target views, online views, ids) of an epoch; the ids are indices in the training set."""
    for first, second, _, ids in source.train_views(epoch, 0):
        yield first, second, ids.to(first.device)
