"""The training loop: two encoders, one loss, and a state from which a run can resume at any step."""

import contextlib
import itertools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from msf_core import EMATarget, MeanShiftLoss, MemoryBank, Neighbors
from msf_core.distributed import Ranks
from msf_core.schedules import Schedule, cosine, linear
from pipeline.data.photos import workers_of
from pipeline.data.source import DataSource, Views
from pipeline.models.backbones import Encoder, build_backbone, mlp, stem_of, usual_size
from pipeline.running.progress import Progress
from pipeline.running.ranks import parallel, shuffled, synchronized
from pipeline.running.seeds import seed_of
from pipeline.training.health import MEASURES, Averages, means_of, measure, warnings_of
from pipeline.training.settings import Settings
from pipeline.training.timing import TimedSearch, WaitClock, loader_limit

Row = dict[str, Any]  # the metrics of one epoch
CHECK_EVERY = 50  # steps between checks that loss and weights are finite, which wait for the GPU
LOG_EVERY = 100  # steps between calls of ``log``, which wait for the GPU
PARTS = ("online", "predictor", "target", "criterion", "optimizer")
STATE = {"settings", "train_size", "step", "history", "sums", "notes", *PARTS}


class Diverged(RuntimeError):
    """The loss, or a weight, is no longer a finite number."""


class StopRequest:
    """Records a Ctrl-C or SIGTERM, so that training stops after the current step. A second Ctrl-C stops at once.

    Python delivers signals only to the main thread. To stop training in another thread, set the attribute ``signal``.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Trainer:
    """A training run. `state_dict` holds everything that `train` needs to continue exactly.

    Each rank has its own trainer; all ranks must call the same methods in the same order.
    """

    def __init__(self, settings: Settings, source: DataSource, device: torch.device, ranks: Ranks) -> None:
        self.settings, self.source, self.device, self.ranks = settings, source, device, ranks
        self.steps_per_epoch = source.train_size // settings.batch_size
        self.total_steps = settings.steps or settings.epochs * self.steps_per_epoch
        self.total_epochs = -(-self.total_steps // self.steps_per_epoch)

        torch.manual_seed(settings.seed)
        stem = stem_of(settings.stem, settings.arch, settings.image_size)
        try:
            backbone, features = build_backbone(settings.arch, source.image_shape, stem)
        except ValueError as error:
            text = str(error) if str(error).startswith("--") else f"--arch: {error}"
            if "does not take images" in text and (size := usual_size(settings.arch, source.image_shape[0], stem)):
                text += f"; {settings.arch!r} takes --image-size {size}"
            raise ValueError(text) from error
        online = Encoder(backbone, mlp(features, settings.hidden, settings.dim))
        online = online.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        predictor = mlp(settings.dim, settings.hidden, settings.dim) if settings.predictor == "mlp" else nn.Identity()
        student = nn.Sequential(online, predictor.to(device))
        if settings.batchnorm == "sync" and ranks.size > 1:
            student = synchronized(student, device)
        self.online, self.predictor = student[0], student[1]
        self.target = EMATarget(self.online, momentum=settings.momentum)
        self.search = TimedSearch(settings.backend, device)
        options = {"exclude_same_id": settings.exclude_same_id, "same_label": settings.same_label}
        self.criterion = MeanShiftLoss(self._build_bank(), k=self._k(), **options).to(device)
        self.student: nn.Module = parallel(student, source.image_shape, device) if ranks.size > 1 else student
        self.optimizer = torch.optim.SGD(
            student.parameters(), settings.lr, momentum=settings.sgd_momentum, weight_decay=settings.weight_decay
        )
        self.lr = cosine(settings.lr, 0.0, steps=self.total_steps)
        self.precision = self._choose_precision()

        self.step = 0
        self.stopped = 0  # the signal by which a rank was asked to stop, once all ranks know of it
        self.history: list[Row] = []
        self.averages = Averages(device)  # over the epoch so far, on this rank
        self.losses: list[Tensor] = []  # losses of the steps since they were last averaged
        self.averaged: list[float] = []  # earlier losses, averaged but not yet written
        self.warned: set[str] = set()
        self.notes: dict[str, Any] = {}  # what the script saves with the weights

    @property
    def backbone(self) -> nn.Module:
        """The online encoder's backbone, which is evaluated and exported."""
        return self.online.get_submodule("backbone")

    @property
    def leads(self) -> bool:
        """Whether this process is the one that evaluates, logs and writes."""
        return self.ranks.rank == 0

    def train(
        self, stop: StopRequest, after_epoch: Callable[[Row], None], log: Callable[[], None] = lambda: None
    ) -> None:
        """Train to the last step, or until a rank is asked to stop.

        Args:
            stop: requests a stop.
            after_epoch: called with each epoch's averages, and may add to them.
            log: called within an epoch every `LOG_EVERY` steps.

        Raises:
            OSError: images of a step could not be read. All ranks raise it, before they begin that step.
            Diverged: a loss or a weight is not finite; noticed within `CHECK_EVERY` steps.
        """
        with Progress(
            self.step, self.total_steps, self.total_epochs, self.settings.batch_size, speaks=self.leads
        ) as progress:
            while self.step < self.total_steps and not self.stopped:
                try:
                    self._train_epoch(stop, after_epoch, log, progress)
                except OSError:
                    self.check_sound()  # a checkpoint will be written
                    raise

    def _train_epoch(
        self, stop: StopRequest, after_epoch: Callable[[Row], None], log: Callable[[], None], progress: Progress
    ) -> None:
        epoch, first_step = divmod(self.step, self.steps_per_epoch)
        last = min((epoch + 1) * self.steps_per_epoch, self.total_steps)
        started, waiting = time.perf_counter(), WaitClock(self.device)
        views = waiting.over(iter(self.source.train_views(epoch, first_step * self.settings.accumulate)))
        while self.step < last:
            micro_batches = self._fetch(views, stop)
            if self.stopped:
                self.check_sound()
                return  # in the middle of the epoch: its sums are kept
            self._train_step(micro_batches)
            progress.after_step(self.step, epoch + 1, self.averages.means)
            if self.step % CHECK_EVERY == 0:
                self.check_sound()
            if self.step % LOG_EVERY == 0 and self.step < last:
                log()
        next(views, None)  # lets the workers finish the epoch
        self._agree(stop)
        self.check_sound()
        means = means_of(self._sums_of_all().sum(dim=0))
        seconds, steps = time.perf_counter() - started, self.step - epoch * self.steps_per_epoch - first_step
        row: Row = {
            "epoch": epoch + 1,
            "step": self.step,
            **means,
            "lr": self.lr(self.step),
            "images_per_second": steps * self.settings.batch_size / seconds,
            "data_share": waiting.take_seconds() / seconds,
            "search_share": self.search.take_seconds() / seconds,
        }
        self.averages = Averages(self.device)
        self.history.append(row)
        for warning in warnings_of(row) if self.leads else []:
            self._warn(f"after epoch {row['epoch']}: {warning}", once=warning)
        workers = self.source.workers
        if self.leads and workers is not None and (limit := loader_limit(row, workers, workers_of(-1))):
            self._warn(limit, once="loader")
        after_epoch(row)
        progress.after_epoch(row)

    def _warn(self, warning: str, once: str) -> None:
        """Print a warning, unless there was one with the same value of ``once`` before."""
        if once not in self.warned:
            tqdm.write(f"warning: {warning}", file=sys.stderr)
            self.warned.add(once)

    def _fetch(self, views: Iterator[Views], stop: StopRequest) -> list[Views]:
        """Return this rank's micro-batches of the next step, once all ranks have theirs and agree whether to stop."""
        micro_batches: list[Views] = []
        problem: OSError | None = None
        try:
            micro_batches += itertools.islice(views, self.settings.accumulate)
        except OSError as error:  # an unreadable image, or a reading process that died
            problem = error
        self._agree(stop, problem)
        return micro_batches

    def _agree(self, stop: StopRequest, problem: OSError | None = None) -> None:
        """Stop all ranks at the same step if one of them received a signal or failed."""
        if self.ranks.size == 1:
            self.stopped = stop.signal
            if problem is not None:
                raise problem
            return
        self.stopped = max(self.ranks.agree("step", same={"step": self.step}, count=stop.signal, problem=problem))

    def _train_step(self, micro_batches: list[Views]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        self.optimizer.zero_grad()
        losses = [self._backward(number, *views) for number, views in enumerate(micro_batches)]
        self.optimizer.step()
        self.target.update(self.online)
        self.losses.append(torch.stack(losses).mean())
        self.step += 1

    def _backward(self, number: int, target_view: Tensor, online_view: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """Add a micro-batch's gradient to those of the step; return its loss."""
        last = number == self.settings.accumulate - 1
        if self.settings.views == "same":
            target_view = online_view
        for_target, for_online = [target_view], [online_view]
        if self.settings.symmetric:  # prediction i is paired with the target of the other view
            for_target = for_online = [target_view, online_view]
        seeds = (self.settings.seed, self.step, number)
        torch.manual_seed(seed_of(*seeds, self.ranks.rank))  # for dropout and the like, the same after a resume
        alone = isinstance(self.student, DistributedDataParallel) and not last
        with self.student.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                us = [self._targets(view, (*seeds, place) if place else seeds) for place, view in enumerate(for_target)]
                vs = [self.student(view) for view in for_online]
            loss, neighbors = self._loss(vs, us, labels, ids)
            (loss / self.settings.accumulate).backward()
        views = len(us)
        measures = measure(
            loss, torch.cat(us), neighbors, labels.repeat(views), (target_view, online_view), self.criterion.bank
        )
        measures["age"] = measures["age"] / (self.settings.batch_size * views)  # in steps
        self.averages.add(measures)
        detached: Tensor = loss.detach()
        return detached

    def _targets(self, view: Tensor, seeds: tuple[int, ...]) -> Tensor:
        """Return the target encoder's embeddings of a view; ``seeds`` determine how ranks shuffle its images."""
        if self.settings.batchnorm == "shuffle" and self.ranks.size > 1:
            return shuffled(self.target, view, self.ranks, *seeds)
        embeddings: Tensor = self.target(view)
        return embeddings

    def _loss(self, vs: list[Tensor], us: list[Tensor], labels: Tensor, ids: Tensor) -> tuple[Tensor, Neighbors]:
        """Return the loss of predictions and targets, one or two views each, and the neighbors of all targets."""
        kept = ids if self.settings.exclude_same_id else None  # stored with each row, in 8 bytes
        if len(us) == 1:
            loss, neighbors = self.criterion(vs[0], us[0], labels, ids=kept, return_neighbors=True)
            return loss, neighbors
        loss, of_views = self.criterion(vs, us, labels, ids=kept, return_neighbors=True)
        return loss, Neighbors(*(torch.cat(parts) for parts in zip(*of_views, strict=True)))

    def check_sound(self) -> None:
        """Raise Diverged on all ranks if a loss of this epoch or a weight is not finite. All ranks must call it."""
        loss = float(self._sums_of_all()[:, 0, MEASURES.index("loss")].sum())
        parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        lengths = torch.stack([torch.linalg.vector_norm(parameter.detach().float()) for parameter in parameters])
        if math.isfinite(loss) and lengths.isfinite().all():
            return
        what = "a weight is no longer a finite number" if math.isfinite(loss) else f"the loss became {loss}"
        advice = f"start again with a lower --lr than {self.settings.lr:g}"
        if self.precision != "float32":
            advice += ", or with --precision float32"
        raise Diverged(f"{what} by step {self.step} of {self.total_steps}: {advice}")

    def average_losses(self) -> list[float]:
        """Return the loss of every step since `losses_written`, averaged over all ranks. All ranks must call it."""
        if self.losses:
            losses = torch.stack(self.losses)[None]
            self.losses = []
            if self.ranks.size > 1:
                losses = self.ranks.gather(losses, [1] * self.ranks.size)
            # Sum in rank order; the order of all_reduce would depend on the number of steps.
            self.averaged += (sum(losses[1:], losses[0]) / self.ranks.size).tolist()
        return self.averaged

    def losses_written(self) -> None:
        """Forget the losses that `average_losses` has returned, because they have been written."""
        self.averaged = []

    def _sums_of_all(self) -> Tensor:
        """Return the sums and counts of every rank, [W, 2, measures]."""
        own = self.averages.sums[None]
        return self.ranks.gather(own, [1] * self.ranks.size) if self.ranks.size > 1 else own

    def _k(self) -> int | Schedule:
        s = self.settings
        return linear(s.k, s.k_end, steps=self.total_steps * s.accumulate) if s.k_end else s.k

    def _build_bank(self) -> MemoryBank | None:
        s = self.settings
        if s.method == "byol":
            return None
        return MemoryBank(
            s.bank_size, s.dim, dtype=getattr(torch, s.bank_dtype), backend=self.search, layout=s.bank_layout
        )

    def _choose_precision(self) -> str:
        if self.settings.precision != "auto":
            return self.settings.precision
        return "bfloat16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"

    def state_dict(self) -> dict[str, Any]:
        """Return weights, bank, optimizer, counters and metrics under the keys `STATE`. All ranks must call it."""
        return {
            "settings": asdict(self.settings),
            "train_size": self.source.train_size,
            "step": self.step,
            "history": self.history,
            "sums": self._sums_of_all().cpu(),
            "notes": self.notes,
            **{name: getattr(self, name).state_dict() for name in PARTS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state.

        Raises:
            ValueError: it was saved with a different number of training images.
            RuntimeError: its weights do not fit.
        """
        if state["train_size"] != self.source.train_size:
            raise ValueError(
                f"the run to resume had {state['train_size']} training images, but there are now "
                f"{self.source.train_size}, and the order of the images depends on their number: put removed files "
                "back (with --on-bad-image skip, an empty file of the same name is enough), and remove added ones"
            )
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.history, self.notes = state["step"], state["history"], state["notes"]
        sums = state["sums"].to(self.device)  # [W, 2, measures], of the ranks that saved the state
        if len(sums) == self.ranks.size:
            self.averages.sums = sums[self.ranks.rank]
        elif self.leads:
            self.averages.sums = sums.sum(dim=0)
