"""The training loop: two encoders, one loss, and a state that can stop and go on at any step."""

import contextlib
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from msf_core import EMATarget, MeanShiftLoss, MemoryBank
from msf_core.distributed import Ranks
from msf_core.schedules import Schedule, cosine, linear
from training.data import DataSource, UnreadableImage, Views, seed_of
from training.health import Averages, means_of, measure, warnings_of
from training.models import Encoder, build_backbone, mlp, stem_of
from training.photos import workers_of
from training.ranks import parallel, shuffled, synchronized
from training.settings import Settings
from training.timing import TimedSearch, WaitClock, loader_limit

Row = dict[str, Any]  # one epoch of the metrics
SHOWN = ("loss", "purity")  # beside the progress bar
PARTS = ("online", "predictor", "target", "criterion", "optimizer")
STATE = {"settings", "train_size", "step", "history", "sums", "notes", *PARTS}


class Diverged(RuntimeError):
    """The loss is no longer a number."""


class StopRequest:
    """Remembers a Ctrl-C or SIGTERM, so that the step under way ends first. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Trainer:
    """All that a run consists of. `state_dict` holds everything that a later `train` needs to go on exactly.

    With several ranks each has a trainer; all of them call the same methods together.
    """

    def __init__(self, settings: Settings, source: DataSource, device: torch.device, ranks: Ranks) -> None:
        self.settings, self.source, self.device, self.ranks = settings, source, device, ranks
        self.steps_per_epoch = source.train_size // settings.batch_size
        if self.steps_per_epoch < 1:
            raise ValueError(f"--batch-size {settings.batch_size} is more than the {source.train_size} training images")
        self.total_steps = settings.steps or settings.epochs * self.steps_per_epoch
        self.total_epochs = -(-self.total_steps // self.steps_per_epoch)

        torch.manual_seed(settings.seed)
        stem = stem_of(settings.stem, settings.arch, settings.image_size)
        backbone, features = build_backbone(settings.arch, source.image_shape, stem)
        online = Encoder(backbone, mlp(features, settings.hidden, settings.dim))
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        online = online.to(device, memory_format=layout)  # type: ignore[call-overload]
        predictor = mlp(settings.dim, settings.hidden, settings.dim) if settings.predictor == "mlp" else nn.Identity()
        student = nn.Sequential(online, predictor.to(device))
        if settings.batchnorm == "sync" and ranks.size > 1:
            student = synchronized(student, device)
        self.online, self.predictor = student[0], student[1]
        self.target = EMATarget(self.online, momentum=settings.momentum)
        self.search = TimedSearch(settings.backend, device)
        self.criterion = MeanShiftLoss(self._build_bank(), k=self._k()).to(device)
        self.student: nn.Module = parallel(student, source.image_shape, device) if ranks.size > 1 else student
        self.optimizer = torch.optim.SGD(
            student.parameters(), settings.lr, momentum=settings.sgd_momentum, weight_decay=settings.weight_decay
        )
        self.lr = cosine(settings.lr, 0.0, steps=self.total_steps)
        self.precision = self._choose_precision()

        self.step = 0
        self.stopped = 0  # the signal that asked a rank to stop, once all know
        self.history: list[Row] = []
        self.averages = Averages(device)  # over the epoch so far, on this rank
        self.losses: list[Tensor] = []  # of the steps since they were last averaged
        self.averaged: list[float] = []  # of those before, not written yet
        self.warned: set[str] = set()
        self.notes: dict[str, Any] = {}  # what the script wants kept beside the weights

    @property
    def backbone(self) -> nn.Module:
        """The online encoder's backbone: what is evaluated and exported."""
        return self.online.get_submodule("backbone")

    @property
    def leads(self) -> bool:
        """Whether this process is the one that evaluates, logs and writes."""
        return self.ranks.rank == 0

    def train(self, stop: StopRequest, after_epoch: Callable[[Row], None]) -> None:
        """Train to the last step, or until a rank is asked to stop. ``after_epoch`` may add to its row.

        Raises:
            UnreadableImage: on all ranks; nothing of that step has happened.
            Diverged: the loss of a step was not finite.
        """
        interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
        with tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=interval,
            disable=not self.leads,
        ) as bar:
            while self.step < self.total_steps and not self.stopped:
                self._train_epoch(stop, after_epoch, bar)

    def _train_epoch(self, stop: StopRequest, after_epoch: Callable[[Row], None], bar: tqdm) -> None:
        epoch, first_step = divmod(self.step, self.steps_per_epoch)
        last = min((epoch + 1) * self.steps_per_epoch, self.total_steps)
        started, waiting = time.perf_counter(), WaitClock(self.device)
        views = waiting.over(iter(self.source.train_views(epoch, first_step * self.settings.accumulate)))
        while self.step < last:
            micro_batches = self._fetch(views, stop)
            if self.stopped:
                return  # within the epoch: its sums are kept
            self._train_step(micro_batches)
            bar.update()
            if self.step % 10 == 0 and self.leads:
                shown = {name: f"{mean:.3f}" for name, mean in self.averages.means().items() if name in SHOWN}
                bar.set_postfix(epoch=epoch + 1, **shown, refresh=False)
        next(views, None)  # lets the workers come to the end of the epoch
        self._agree(stop)
        means = means_of(self._sums_of_all().sum(dim=0))
        if not math.isfinite(means["loss"]):
            raise Diverged(f"the loss became {means['loss']} in epoch {epoch + 1}: try a lower --lr")
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

    def _warn(self, warning: str, once: str) -> None:
        """Print a warning, the first time that it comes under this name."""
        if once not in self.warned:
            tqdm.write(f"warning: {warning}", file=sys.stderr)
            self.warned.add(once)

    def _fetch(self, views: Iterator[Views], stop: StopRequest) -> list[Views]:
        """Return this rank's micro-batches of the next step, once all ranks have theirs and none is to stop."""
        micro_batches: list[Views] = []
        problem: UnreadableImage | None = None
        try:
            micro_batches += itertools.islice(views, self.settings.accumulate)
        except UnreadableImage as error:
            problem = error
        self._agree(stop, problem)
        return micro_batches

    def _agree(self, stop: StopRequest, problem: UnreadableImage | None = None) -> None:
        """Stop all ranks, at the same step, when one of them is asked to or cannot go on."""
        if self.ranks.size == 1:
            self.stopped = stop.signal
            if problem is not None:
                raise problem
            return
        try:
            self.stopped = max(self.ranks.agree("step", same={"step": self.step}, count=stop.signal, problem=problem))
        except OSError as error:
            raise UnreadableImage(str(error)) from error

    def _train_step(self, micro_batches: list[Views]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        self.optimizer.zero_grad()
        losses = [self._backward(number, *views) for number, views in enumerate(micro_batches)]
        self.optimizer.step()
        self.target.update(self.online)
        self.losses.append(torch.stack(losses).mean())
        self.step += 1

    def _backward(self, number: int, target_view: Tensor, online_view: Tensor, labels: Tensor) -> Tensor:
        """Add a micro-batch's gradient to those of the step; return its loss."""
        last = number == self.settings.accumulate - 1
        if self.settings.views == "same":
            target_view = online_view
        seeds = (self.settings.seed, self.step, number)
        torch.manual_seed(seed_of(*seeds, self.ranks.rank))  # of dropout and the like: the same after a resume
        alone = isinstance(self.student, DistributedDataParallel) and not last
        with self.student.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                if self.settings.batchnorm == "shuffle" and self.ranks.size > 1:
                    u = shuffled(self.target, target_view, self.ranks, *seeds)
                else:
                    u = self.target(target_view)
                v = self.student(online_view)
            loss, neighbors = self.criterion(v, u, labels, return_neighbors=True)
            (loss / self.settings.accumulate).backward()
        measures = measure(loss, u, neighbors, labels, (target_view, online_view), self.criterion.bank)
        measures["age"] = measures["age"] / self.settings.batch_size  # in steps
        self.averages.add(measures)
        detached: Tensor = loss.detach()
        return detached

    def average_losses(self) -> list[float]:
        """Return the loss of every step since `losses_written`, averaged over all ranks; all of them ask for it."""
        if self.losses:
            losses = torch.stack(self.losses)[None]
            self.losses = []
            if self.ranks.size > 1:
                losses = self.ranks.gather(losses, [1] * self.ranks.size)
            # In rank order, however many steps there are: all_reduce's order depends on that.
            self.averaged += (sum(losses[1:], losses[0]) / self.ranks.size).tolist()
        return self.averaged

    def losses_written(self) -> None:
        """Begin anew with the next step."""
        self.averaged = []

    def _sums_of_all(self) -> Tensor:
        """The sums of every rank, [W, 2, measures]."""
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
        """Return weights, bank, optimizer, counters and metrics under the keys `STATE`; all ranks ask for it."""
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
        """Go back to a saved state.

        Raises:
            ValueError: it was saved with another number of training images.
            RuntimeError: its weights do not fit.
        """
        if state["train_size"] != self.source.train_size:
            raise ValueError(
                f"the run to resume had {state['train_size']} training images, there are {self.source.train_size} here"
            )
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.history, self.notes = state["step"], state["history"], state["notes"]
        sums = state["sums"].to(self.device)  # of the ranks there were
        if len(sums) == self.ranks.size:
            self.averages.sums = sums[self.ranks.rank]
        elif self.leads:
            self.averages.sums = sums.sum(dim=0)
