"""A stand-in for forecasting, CAB's noncausal cross attention: what comes next in a series with a season."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.tasks.contract import Batch, Budget, Split
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.registry import tasks
from attnlab.tasks.scores import squared_error, squared_loss


@tasks.register("cab_nc", family="regression", paper="cab")
class SeasonalForecast(GeneratedTask):
    r"""Predict several channels of a season from its past: noncausal cross attention.

    In each example every channel has a pattern $w \sim N(0, 1)$ of one period p, and $x_t = w_{(t+s) \bmod p} + \sigma\epsilon_t$
    for a random start s. The model is given the calendar, $\sin$ and $\cos$ of $2\pi k (t+s)/p$ for k = 1 and 2, at all times and
    the values at ``past`` of them; queries are the calendar of the ``future`` ones and read the past through the mixer. The
    published tasks of this pattern are point completion and long-range forecasting of measured series.

    Draw order: patterns, starts, noise, each for all examples.

    Args:
        past: times with values, at least a period.
        future: times to predict.
        channels: values a time.
        period: p.
        noise: $\sigma$.
        eval_examples: examples in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        ValueError: for sizes out of range.
    """

    kind = "regression"
    model = "tagger"
    metric = "mse"
    higher_is_better = False
    small: ClassVar[Mapping[str, Any]] = {"eval_examples": 40}

    def __init__(
        self,
        past: int = 24,
        future: int = 8,
        *,
        channels: int = 3,
        period: int = 6,
        noise: float = 0.3,
        eval_examples: int = 512,
        seed: int = 0,
    ) -> None:
        if period < 2 or past < period or future < 1 or channels < 1 or noise < 0.0:
            raise ValueError(
                "past, future, channels, period, noise: expected a period of at least 2 in the past, positive numbers and no "
                f"negative noise, got {past}, {future}, {channels}, {period} and {noise}"
            )
        self.past, self.future, self.channels, self.period, self.noise = past, future, channels, period, float(noise)
        super().__init__(eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A tagger over calendars whose mixer reads calendars with values; no positions, the calendar tells."""
        return {
            "num_outputs": self.channels,
            "input_dim": 4,
            "context_dim": 4 + self.channels,
            "position": "none",
            "context_depth": 1,
        }

    @property
    def default_budget(self) -> Budget:
        """Some 20 seconds on one core."""
        return Budget(steps=500, batch_size=32, learning_rates=(0.005, 0.01), parameters=30_000, depth=1, num_heads=2)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """New patterns and starts."""
        length = self.past + self.future
        patterns = torch.randn(count, self.period, self.channels, generator=generator)
        starts = torch.randint(self.period, (count, 1), generator=generator)
        phases = (starts + torch.arange(length)) % self.period
        noise = self.noise * torch.randn(count, length, self.channels, generator=generator)
        values = patterns.gather(1, phases[..., None].expand(-1, -1, self.channels)) + noise
        calendar = self._calendar(phases)
        known, asked = calendar[:, : self.past], calendar[:, self.past :].contiguous()
        return Batch(asked, values[:, self.past :].contiguous(), context=torch.cat((known, values[:, : self.past]), -1))

    def _calendar(self, phases: Int[Tensor, "b n"]) -> Float[Tensor, "b n 4"]:
        angles = 2.0 * math.pi / self.period * phases[..., None] * torch.tensor([1.0, 2.0])
        return torch.cat((angles.sin(), angles.cos()), -1)

    def loss(self, logits: Float[Tensor, "b n k"], batch: Batch) -> Float[Tensor, ""]:
        """Mean squared error."""
        return squared_loss(logits, batch)

    def metrics(self, logits: Float[Tensor, "b n k"], batch: Batch) -> dict[str, tuple[float, float]]:
        """``mse``, mean squared error at the times to predict."""
        return squared_error(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Squared error of 0, of the last value, of the past's mean; and of the mean of the same times of the season."""
        batch = self.examples(split)
        if batch.context is None:
            raise RuntimeError("the examples have no past")
        past, truth = batch.context[..., 4:], batch.targets
        same = (torch.cdist(batch.inputs, batch.context[..., :4]) < 1e-3).float()
        guesses = {
            "zero": torch.zeros_like(truth),
            "last": past[:, -1:].expand_as(truth),
            "mean": past.mean(1, keepdim=True).expand_as(truth),
            "season": same @ past / same.sum(-1, keepdim=True),
        }
        return {name: float((guess - truth).square().mean()) for name, guess in guesses.items()}
