"""One training run: its recipe, its state, its steps."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.core.record import record
from attnlab.tasks.contract import Batch, Task
from attnlab.training import checkpoint as checkpoints
from attnlab.training.distributed import Processes, targets_in
from attnlab.training.evaluation import device_of, precision
from attnlab.training.optimizer import SCHEDULES, make_optimizer, rate_factor
from attnlab.training.result import LogRow, Status, TrainResult


@dataclass(frozen=True)
class Recipe:
    """What determines the outcome of a run beside model and task; the arguments of `attnlab.training.train`."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: float
    schedule: str
    seed: int
    clip: float | None
    autocast: torch.dtype | None
    auxiliary: dict[str, float]
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps, batch_size: expected positive integers, got {self.steps} and {self.batch_size}")
        if not 1 <= self.accumulate <= self.batch_size:
            raise ValueError(f"accumulate: expected 1 to batch_size={self.batch_size}, got {self.accumulate}")
        if self.learning_rate <= 0.0 or self.weight_decay < 0.0 or not 0.0 <= self.warmup <= 1.0:
            raise ValueError(
                "learning_rate, weight_decay, warmup: expected > 0, >= 0 and in [0, 1], "
                f"got {self.learning_rate}, {self.weight_decay}, {self.warmup}"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {SCHEDULES}, got {self.schedule!r}")
        if self.clip is not None and self.clip <= 0.0:
            raise ValueError(f"clip: expected a positive number or None, got {self.clip}")


@dataclass
class Progress:
    """Where a run stands; all of it is in a checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0


class Run:
    """A training run that can be executed, stopped and gone on with; see `attnlab.training.train` for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        log_every: int = 20,
        callback: Callable[[LogRow], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        time_limit: float | None = None,
        processes: Processes | None = None,
    ) -> None:
        for name, value in (("log_every", log_every), ("checkpoint_every", checkpoint_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        self.model, self.task, self.recipe = model, task, recipe
        self.log_every, self.callback = log_every, callback
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.time_limit = math.inf if time_limit is None else time_limit
        self.processes = processes or Processes()
        if recipe.batch_size < self.processes.size * recipe.accumulate:
            raise ValueError(
                f"batch_size: expected an example for each of {self.processes.size} processes and {recipe.accumulate} pieces, "
                f"got {recipe.batch_size}"
            )
        self.processes.place(model)
        self.device = device_of(model)
        self.optimizer = make_optimizer(model, recipe.learning_rate, recipe.weight_decay)
        self.progress = Progress()
        self.history: list[LogRow] = []
        self.status: Status = "finished"

    def execute(self) -> bool:
        """Train from the checkpoint or the start until the end, the time limit, or a loss that is not finite.

        Returns:
            Whether the model's parameters are worth evaluating: False if it diverged.
        """
        training = {module: module.training for module in self.model.modules()}
        try:
            with self._generators() as generators:
                if self.processes.main_says(self.checkpoint is not None and Path(self.checkpoint).exists()):
                    self._load(generators)
                self.model.train()
                self._loop(generators)
                self._save(generators)
        finally:
            for module, mode in training.items():
                module.training = mode
        return self.status != "diverged"

    def result(self, metrics: dict[str, float]) -> TrainResult:
        """What `train` returns, with the metrics of a final evaluation."""
        done = self.progress
        rate = done.tokens / done.seconds if done.seconds else 0.0
        return TrainResult(self.status, done.step, self.history, metrics, done.seconds, rate)

    def _loop(self, generators: dict[str, torch.Generator]) -> None:
        batches = self.task.train_batches(self.recipe.batch_size, generators["data"])
        begun, before, done = time.perf_counter(), self.progress.seconds, self.progress
        while self.status == "finished" and done.step < self.recipe.steps:
            if self.time_limit < math.inf and self.processes.main_says(time.perf_counter() - begun >= self.time_limit):
                self.status = "time_limit"
                break
            loss, norm, rate = self._step(next(batches))
            done.seconds = before + time.perf_counter() - begun
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.status = "diverged"
                break
            done.step, done.loss_sum, done.loss_count = done.step + 1, done.loss_sum + loss, done.loss_count + 1
            if done.step % self.log_every == 0 or done.step == self.recipe.steps:
                self._log(norm, rate)
            every = self.checkpoint_every
            if every is not None and done.step % every == 0 and done.step < self.recipe.steps:
                self._save(generators)

    def _step(self, batch: Batch) -> tuple[float, float, float]:
        """One optimiser step, left out if loss or gradient is not finite; loss, gradient norm and rate."""
        rate = self.recipe.learning_rate * rate_factor(
            self.progress.step, self.recipe.steps, self.recipe.warmup, self.recipe.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.processes.add_up(self.model, self._backward(batch))
        limit = math.inf if self.recipe.clip is None else self.recipe.clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        value, size = torch.stack((loss.double(), norm.double())).tolist()
        if math.isfinite(value) and math.isfinite(size):
            self.optimizer.step()
            self.progress.tokens += batch.num_tokens
        self.processes.share_buffers(self.model)
        return value, size, rate

    def _backward(self, batch: Batch) -> Tensor:
        """Gradients of this process's share of the batch's loss, piece by piece; the share."""
        targets, share = targets_in(batch), torch.zeros((), device=self.device)
        for piece in self.processes.pieces(batch, self.recipe.accumulate):
            # The mean over a piece counts as much as it has targets: pieces and processes may have more or fewer.
            weight = targets_in(piece) / targets if targets else math.nan
            with precision(self.device, self.recipe.autocast):
                loss = self._loss(piece.to(self.device), weight, len(piece) / len(batch))
            if loss.requires_grad:
                loss.backward()
            share = share + loss.detach()
        return share

    def _loss(self, batch: Batch, weight: float, part: float) -> Tensor:
        """The loss with its weight, and auxiliary losses with theirs times the part of the examples that these are."""
        if not self.recipe.auxiliary:
            return self._of_task(batch, weight)
        with record(self.model, only=list(self.recipe.auxiliary)) as tape:
            loss = self._of_task(batch, weight)
        for name, factor in self.recipe.auxiliary.items():
            loss = loss + part * factor * sum(value.float() for value in tape.matching(f"/{name}").values())
        return loss

    def _of_task(self, batch: Batch, weight: float) -> Tensor:
        logits = batch.through(self.model)
        # Where no target takes part the mean is 0/0; the model has run all the same, so that it draws what it would draw.
        return weight * self.task.loss(logits, batch) if weight else 0.0 * logits.sum()

    def _log(self, norm: float, rate: float) -> None:
        done = self.progress
        row = LogRow(done.step, done.loss_sum / done.loss_count, rate, norm, done.seconds)
        done.loss_sum, done.loss_count = 0.0, 0
        self.history.append(row)
        if self.callback is not None and self.processes.main:
            self.callback(row)

    @contextmanager
    def _generators(self) -> Iterator[dict[str, torch.Generator]]:
        """All generators that the run draws from: the data's, torch's own, and those that modules hold."""
        cuda = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            found = {"data": torch.Generator().manual_seed(2 * self.recipe.seed), "torch": torch.default_generator}
            if cuda:
                found["cuda"] = torch.cuda.default_generators[cuda[0]]
            for name in ("torch", "cuda"):
                if name in found:
                    # What other processes draw is for other examples.
                    found[name].manual_seed(2 * self.recipe.seed + 1 + 2**32 * self.processes.rank)
            for path, module in self.model.named_modules():
                own = getattr(module, "generator", None)
                if isinstance(own, torch.Generator) and all(own is not other for other in found.values()):
                    found[f"module.{path}"] = own
            yield found

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with; as JSON gives it back."""
        recipe = asdict(self.recipe)
        recipe["autocast"] = None if self.recipe.autocast is None else str(self.recipe.autocast)
        model = hashlib.sha256(repr(self.model).encode()).hexdigest()[:16]
        return {
            "task": self.task.info.name,
            "data": self.task.fingerprint(),
            "model": model,
            "processes": self.processes.size,
            **recipe,
        }

    def _save(self, generators: dict[str, torch.Generator]) -> None:
        if self.checkpoint is None:
            return
        states = self.processes.gather({name: generator.get_state() for name, generator in generators.items()})
        if self.processes.main:
            self._write(self.checkpoint, states)
        self.processes.wait()

    def _write(self, path: str | os.PathLike[str], states: list[dict[str, Tensor]]) -> None:
        facts = {
            "run": self._identity(),
            "status": self.status,
            "progress": asdict(self.progress),
            "history": [asdict(row) for row in self.history],
        }
        checkpoints.save(path, checkpoints.pack(self.model, self.optimizer, states), facts)

    def _load(self, generators: dict[str, torch.Generator]) -> None:
        tensors, facts = checkpoints.load(self.checkpoint)  # type: ignore[arg-type]
        wanted, found = self._identity(), facts["run"]
        if differing := sorted(name for name in wanted if wanted[name] != found.get(name)):
            told = ", ".join(f"{name}: expected {wanted[name]!r}, got {found.get(name)!r}" for name in differing)
            raise ValueError(f"checkpoint: {self.checkpoint} belongs to another run ({told}); give another file")
        checkpoints.unpack(tensors, self.model, self.optimizer, generators, self.processes.rank)
        self.progress = Progress(**facts["progress"])
        self.history = [LogRow(**row) for row in facts["history"]]
        self.status = "diverged" if facts["status"] == "diverged" else "finished"
