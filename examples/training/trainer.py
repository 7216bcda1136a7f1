"""The training loop: two encoders, one loss, and a state that can stop and go on at any step."""

import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from msf_core import EMATarget, MeanShiftLoss, MemoryBank, embedding_spread, neighbor_purity
from msf_core.schedules import cosine
from training.data import DataSource
from training.models import Encoder, build_backbone, mlp
from training.settings import Settings
from training.timing import TimedSearch, WaitClock

Row = dict[str, Any]  # one epoch of the metrics
PARTS = ("online", "predictor", "target", "criterion", "optimizer")
STATE = {"settings", "train_size", "step", "history", "sums", "notes", "rng", *PARTS}


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
    """All that a run consists of. `state_dict` holds everything that a later `train` needs to go on exactly."""

    def __init__(self, settings: Settings, source: DataSource, device: torch.device) -> None:
        self.settings, self.source, self.device = settings, source, device
        self.steps_per_epoch = source.train_size // settings.batch_size
        if self.steps_per_epoch < 1:
            raise ValueError(f"--batch-size {settings.batch_size} is more than the {source.train_size} training images")
        self.total_steps = settings.steps or settings.epochs * self.steps_per_epoch
        self.total_epochs = -(-self.total_steps // self.steps_per_epoch)

        torch.manual_seed(settings.seed)
        backbone, features = build_backbone(settings.arch, source.image_shape)
        online = Encoder(backbone, mlp(features, settings.hidden, settings.dim))
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.online = online.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.predictor = mlp(settings.dim, settings.hidden, settings.dim).to(device)
        self.target = EMATarget(self.online, momentum=settings.momentum)
        self.search = TimedSearch(settings.backend, device)
        self.criterion = MeanShiftLoss(self._build_bank(), k=settings.k).to(device)
        self.parameters = [*self.online.parameters(), *self.predictor.parameters()]
        self.optimizer = torch.optim.SGD(
            self.parameters, settings.lr, momentum=settings.sgd_momentum, weight_decay=settings.weight_decay
        )
        self.lr = cosine(settings.lr, 0.0, steps=self.total_steps)
        self.precision = self._choose_precision()

        self.step = 0
        self.history: list[Row] = []
        self.sums = self._no_sums()
        self.notes: dict[str, Any] = {}  # what the script wants kept beside the weights

    @property
    def backbone(self) -> nn.Module:
        """The online encoder's backbone: what is evaluated and exported."""
        return self.online.backbone

    def train(self, stop: StopRequest, after_epoch: Callable[[Row], None]) -> None:
        """Train to the last step, or until a stop is asked for. ``after_epoch`` may add to its row."""
        interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
        with tqdm(
            total=self.total_steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=interval
        ) as bar:
            while self.step < self.total_steps and not stop.signal:
                self._train_epoch(stop, after_epoch, bar)

    def _train_epoch(self, stop: StopRequest, after_epoch: Callable[[Row], None], bar: tqdm) -> None:
        epoch, first_step = divmod(self.step, self.steps_per_epoch)
        started, waiting = time.perf_counter(), WaitClock()
        views = self.source.train_views(epoch, first_step)
        for target_view, online_view, labels in waiting.over(iter(views)):
            self._train_step(target_view, online_view, labels)
            bar.update()
            if self.step % 10 == 0:
                loss, purity, _ = self._means()
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", purity=f"{purity:.3f}", refresh=False)
            if stop.signal or self.step == self.total_steps:
                break
        if self.step % self.steps_per_epoch and self.step < self.total_steps:
            return  # stopped within the epoch: its sums are kept
        loss, purity, spread = self._means()
        if not math.isfinite(loss):
            raise Diverged(f"the loss became {loss} in epoch {epoch + 1}: try a lower --lr")
        seconds, steps = time.perf_counter() - started, self.step - epoch * self.steps_per_epoch - first_step
        row: Row = {
            "epoch": epoch + 1,
            "step": self.step,
            "loss": loss,
            "purity": purity,
            "spread": spread,
            "lr": self.lr(self.step),
            "images_per_second": steps * self.settings.batch_size / seconds,
            "data_share": waiting.seconds / seconds,
            "search_share": self.search.take_seconds() / seconds,
        }
        self.sums = self._no_sums()
        self.history.append(row)
        after_epoch(row)

    def _train_step(self, target_view: Tensor, online_view: Tensor, labels: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            u = self.target(target_view)
            v = self.predictor(self.online(online_view))
        loss, neighbors = self.criterion(v, u, labels, return_neighbors=True)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.target.update(self.online)
        self.step += 1
        purity = neighbor_purity(neighbors.label, labels)
        self.sums += torch.stack(
            [loss.detach(), purity.nan_to_num(0.0), embedding_spread(u), torch.ones_like(purity), purity.isfinite()]
        )

    def _no_sums(self) -> Tensor:
        """Loss, purity, spread, steps, steps with a purity: of the epoch so far."""
        return torch.zeros(5, dtype=torch.float64, device=self.device)

    def _means(self) -> tuple[float, float, float]:
        loss, purity, spread, steps, with_purity = self.sums.tolist()
        return loss / steps, purity / with_purity if with_purity else float("nan"), spread / steps

    def _build_bank(self) -> MemoryBank | None:
        s = self.settings
        if s.method == "byol":
            return None
        return MemoryBank(s.bank_size, s.dim, dtype=getattr(torch, s.bank_dtype), backend=self.search)

    def _choose_precision(self) -> str:
        if self.settings.precision != "auto":
            return self.settings.precision
        return "bfloat16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"

    def state_dict(self) -> dict[str, Any]:
        """Return weights, bank, optimizer, counters, metrics and random state, under the keys `STATE`."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "settings": asdict(self.settings),
            "train_size": self.source.train_size,
            "step": self.step,
            "history": self.history,
            "sums": self.sums.cpu(),
            "notes": self.notes,
            "rng": rng,
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
        self.sums = state["sums"].to(self.device)
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
