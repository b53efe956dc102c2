"""In-context linear regression in closed form: what softmax heads compute, and how well anything can."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.claims.cells import Cells
from attnlab.claims.quantity import Measured, over
from attnlab.tasks.icl.estimators import (
    Prompt,
    approximate_loss,
    debiased_gradient_step,
    gradient_step,
    optimal_mu,
    ridge,
    ridge_loss_limit,
    softmax_estimate,
)
from attnlab.tasks.icl.regression import InContextRegression


def prompts(dim: int, length: int, variance: float, count: int, seed: int) -> tuple[Prompt, Float[Tensor, "b"]]:
    """Prompts and the noisy answers to them."""
    ((found, truth),) = InContextRegression(dim, length, noise_variance=variance, eval_examples=count, seed=seed).prompts("test")
    return found, truth


def error(guess: Float[Tensor, "b"], truth: Float[Tensor, "b"], *, scaled: bool = True) -> float:
    """Mean squared error, of the best multiple where ``scaled``."""
    scale = float(guess @ truth / (guess @ guess)) if scaled else 1.0
    return float((scale * guess - truth).square().mean())


def two_heads(
    cells: Cells, *, dim: int, length: int, variance: float, omegas: Sequence[float], count: int, draws: int
) -> Measured:
    """Two softmax heads of opposite sign against one step of gradient descent with the means taken off, and against one head.

    The heads score with omega and -omega and count with mu and -mu. Each estimator has its best multiple, heads the best omega.

    Quantities: "distance", at the least omega, norm of what the heads and the step differ by over the step's; "order", the binary
    logarithm of how often the distance falls when omega is halved; "one", "two", "debiased" and "biased", squared errors; "gain",
    one less two; "apart", two less debiased.

    Args:
        cells: keeps each draw.
        dim: d.
        length: L.
        variance: of the noise.
        omegas: scores' scales; the last two in the ratio 2 : 1, the last the least.
        count: prompts a draw.
        draws: seeds.
    """

    def measure(seed: int) -> dict[str, float]:
        prompt, truth = prompts(dim, length, variance, count, seed)
        step = debiased_gradient_step(prompt, 1.0)
        distances, one, two = [], [], []
        for omega in omegas:
            pair = torch.tensor([omega, -omega], dtype=torch.float64)
            heads = softmax_estimate(prompt, pair, pair.sign() / (2.0 * omega))
            distances.append(float((heads - step).norm() / step.norm()))
            two.append(error(heads, truth))
            one.append(error(softmax_estimate(prompt, pair[:1], torch.ones(1, dtype=torch.float64)), truth))
        return {
            "distance": distances[-1],
            "order": math.log2(distances[-2] / distances[-1]),
            "one": min(one),
            "two": min(two),
            "debiased": error(step, truth),
            "biased": error(gradient_step(prompt, 1.0), truth),
        }

    settings = {"dim": dim, "length": length, "variance": variance, "omegas": list(omegas), "count": count}
    runs = _draws(cells, "softmax heads against gradient descent", settings, draws, measure)
    quantities = {name: over([run[name] for run in runs]) for name in runs[0]}
    quantities["gain"] = over([run["one"] - run["two"] for run in runs])
    quantities["apart"] = over([run["two"] - run["debiased"] for run in runs])
    return Measured(quantities, {"draws": runs})


def predicted_loss(
    cells: Cells, *, dim: int, length: int, variance: float, omegas: Sequence[float], count: int, draws: int
) -> Measured:
    """The paper's approximation of the loss of softmax heads with the best weights against the loss on prompts.

    Quantities: "one" and "two", the largest relative difference over the scales, of one head and of two of opposite sign.

    Args:
        cells: keeps each draw.
        dim: d.
        length: L.
        variance: of the noise.
        omegas: scores' scales.
        count: prompts a draw.
        draws: seeds.
    """

    def measure(seed: int) -> dict[str, float]:
        prompt, truth = prompts(dim, length, variance, count, seed)
        found = {}
        for label, signs in (("one", [1.0]), ("two", [1.0, -1.0])):
            apart = []
            for scale in omegas:
                omega = scale * torch.tensor(signs, dtype=torch.float64)
                mu = optimal_mu(omega, dim, length, variance)
                expected = float(approximate_loss(omega, mu, dim, length, variance))
                apart.append(abs(error(softmax_estimate(prompt, omega, mu), truth, scaled=False) / expected - 1.0))
            found[label] = max(apart)
        return found

    settings = {"dim": dim, "length": length, "variance": variance, "omegas": list(omegas), "count": count}
    runs = _draws(cells, "approximate loss", settings, draws, measure)
    return Measured({name: over([run[name] for run in runs]) for name in runs[0]}, {"draws": runs})


def ridge_limit(cells: Cells, *, dim: int, ratios: Sequence[float], variance: float, count: int, draws: int) -> Measured:
    """Squared error of the best ridge regression at a large dimension against its limit.

    Quantities: "difference", the largest relative difference of their means over the ratios; its interval is over draws.

    Args:
        cells: keeps each draw.
        dim: d.
        ratios: d / L.
        variance: of the noise.
        count: prompts a draw.
        draws: seeds.
    """

    def measure(seed: int) -> dict[str, Any]:
        found = {}
        for ratio in ratios:
            prompt, truth = prompts(dim, round(dim / ratio), variance, count, seed)
            found[str(ratio)] = error(ridge(prompt, variance * dim), truth, scaled=False) / ridge_loss_limit(ratio, variance)
        return found

    settings = {"dim": dim, "ratios": list(ratios), "variance": variance, "count": count}
    runs = _draws(cells, "ridge regression", settings, draws, measure)
    worst = max(runs[0], key=lambda ratio: abs(sum(run[ratio] for run in runs) / draws - 1.0))
    return Measured({"ratio": over([run[worst] for run in runs])}, {"worst": worst, "draws": runs})


def _draws(
    cells: Cells, label: str, settings: Mapping[str, Any], draws: int, measure: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    return [
        cells(f"{label}, draw {seed}", {**settings, "seed": seed}, lambda seed=seed: measure(seed))  # type: ignore[misc]
        for seed in range(draws)
    ]
