"""In-context linear regression: the value of a linear function that the sequence's examples define."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.tasks.contract import Batch, Budget, Split
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.icl.estimators import (
    Prompt,
    debiased_gradient_step,
    gradient_step,
    optimal_mu,
    ridge,
    softmax_estimate,
)
from attnlab.tasks.registry import tasks
from attnlab.tasks.scores import squared_error, squared_loss

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "single": {"dim": 5, "num_examples": 40, "noise_variance": 0.1},
    "multi_task": {"dim": 6, "num_examples": 48, "noise_variance": 0.1, "response_dim": 4},
}
"""The paper's sizes; its lengths are 8 dim."""


@tasks.register("in_context_regression", family="regression", paper="icl-linear-regression")
class InContextRegression(GeneratedTask):
    r"""What is the linear function's value at the query (Garg et al. 2022; as He et al. 2025 have it)?

    Tokens are $[x_l; y_l]$ with $x_l \sim N(0, \Sigma)$, $y_l = \beta^\top x_l + \sigma\epsilon_l$ and $\beta \sim N(0, I/d)$ new
    in each sequence; the last one is $[x_q; 0]$, where $y_q$, noisy too, is to be predicted. $\Sigma_{ij} = \rho^{|i-j|}$.

    With ``response_dim`` a token has two responses, linear in the first and in the last so many coordinates; then $\beta$ is not
    divided by $\sqrt d$ and the query's responses have no noise, as published.

    Draw order: inputs of examples and query, coefficients, noise, each for all sequences.

    Args:
        dim: d.
        num_examples: L.
        noise_variance: $\sigma^2$.
        correlation: $\rho$.
        response_dim: coordinates of each of two responses, or None for one response of all.
        eval_examples: sequences in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        ValueError: for sizes out of range.
    """

    kind = "regression"
    model = "tagger"
    metric = "mse"
    higher_is_better = False
    small: ClassVar[Mapping[str, Any]] = {"dim": 3, "num_examples": 12, "eval_examples": 40}

    def __init__(
        self,
        dim: int = 3,
        num_examples: int = 16,
        *,
        noise_variance: float = 0.1,
        correlation: float = 0.0,
        response_dim: int | None = None,
        eval_examples: int = 1024,
        seed: int = 0,
    ) -> None:
        if dim < 1 or num_examples < 1:
            raise ValueError(f"dim, num_examples: expected positive integers, got {dim} and {num_examples}")
        if noise_variance < 0.0 or not -1.0 < correlation < 1.0:
            raise ValueError(
                "noise_variance, correlation: expected a non-negative number and one in (-1, 1), "
                f"got {noise_variance} and {correlation}"
            )
        if response_dim is not None and not 1 <= response_dim <= dim:
            raise ValueError(f"response_dim: expected 1 to {dim}, or None, got {response_dim}")
        self.dim, self.num_examples, self.response_dim = dim, num_examples, response_dim
        self.noise_variance, self.correlation = float(noise_variance), float(correlation)
        super().__init__(eval_examples, seed)

    @property
    def num_responses(self) -> int:
        """Numbers asked for."""
        return 1 if self.response_dim is None else 2

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A tagger over vectors, without positions: the order of the examples means nothing."""
        return {
            "num_outputs": self.num_responses,
            "input_dim": self.dim + self.num_responses,
            "position": "none",
            "max_length": self.num_examples + 1,
        }

    @property
    def default_budget(self) -> Budget:
        """Some 20 seconds on one core."""
        return Budget(steps=600, batch_size=32, learning_rates=(0.005, 0.01), parameters=20_000, depth=2, num_heads=2)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Sequences of functions never seen before."""
        n, d, k = self.num_examples + 1, self.dim, self.num_responses
        lags = torch.arange(d)
        covariance = self.correlation ** (lags[:, None] - lags).abs().double()
        root = torch.linalg.cholesky(covariance).float()
        x = torch.randn(count, n, d, generator=generator) @ root.T
        beta = torch.randn(count, d, k, generator=generator)
        noise = self.noise_variance**0.5 * torch.randn(count, n, k, generator=generator)
        if self.response_dim is None:
            beta = beta / d**0.5
        else:
            beta[:, self.response_dim :, 0] = 0.0
            beta[:, : d - self.response_dim, 1] = 0.0
            noise[:, -1] = 0.0
        y = x @ beta + noise
        targets = torch.full((count, n, k), float("nan"))
        targets[:, -1] = y[:, -1]
        y[:, -1] = 0.0
        return Batch(torch.cat((x, y), -1), targets)

    def loss(self, logits: Float[Tensor, "b n k"], batch: Batch) -> Float[Tensor, ""]:
        """Mean squared error."""
        return squared_loss(logits, batch)

    def metrics(self, logits: Float[Tensor, "b n k"], batch: Batch) -> dict[str, tuple[float, float]]:
        """``mse``, mean squared error at the queries."""
        return squared_error(logits, batch)

    def prompts(self, split: Split) -> list[tuple[Prompt, Float[Tensor, "b"]]]:
        """For each response the examples of a split as `estimators` read them, and what is to be predicted."""
        batch = self.examples(split)
        x, y = batch.inputs.double().split((self.dim, self.num_responses), -1)
        return [(Prompt(x[:, :-1], y[:, :-1, k], x[:, -1]), batch.targets[:, -1, k].double()) for k in range(self.num_responses)]

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Squared error on the same examples of predicting 0, of one step of gradient descent and of its debiased form at their
        best rates, of two softmax heads of opposite sign, and of ridge regression: the mean of the posterior, below which no
        model comes but by chance.
        """
        scale = 1.0 if self.response_dim is not None else 1.0 / self.dim
        small = torch.tensor([0.1, -0.1], dtype=torch.float64)
        mu = optimal_mu(small, self.dim, self.num_examples, self.noise_variance)
        found: dict[str, list[Tensor]] = {}
        for prompt, truth in self.prompts(split):
            guesses = {
                "zero": torch.zeros_like(truth),
                "gradient_step": _at_best_rate(gradient_step(prompt, 1.0), truth),
                "debiased_gradient_step": _at_best_rate(debiased_gradient_step(prompt, 1.0), truth),
                "softmax_heads": _at_best_rate(softmax_estimate(prompt, small, mu), truth),
                "ridge": ridge(prompt, self.noise_variance / scale),
            }
            for name, guess in guesses.items():
                found.setdefault(name, []).append((guess - truth).square().mean())
        return {name: float(torch.stack(errors).mean()) for name, errors in found.items()}


def _at_best_rate(guess: Float[Tensor, "b"], truth: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    return guess * (guess @ truth) / (guess @ guess)
