"""What predicts a linear function's value from examples in closed form, the softmax heads of the theory among it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.attention import attention


class Prompt(NamedTuple):
    """Examples of linear functions, and where each is asked for.

    Args:
        x: (b, L, d).
        y: (b, L).
        query: (b, d).
    """

    x: Float[Tensor, "b l d"]
    y: Float[Tensor, "b l"]
    query: Float[Tensor, "b d"]


def gradient_step(prompt: Prompt, rate: float) -> Float[Tensor, "b"]:
    r"""$\frac{\eta}{L} \sum_l y_l\, x_l^\top x_q$: a step of gradient descent from 0; two heads have $\eta = 2\omega\mu$."""
    scores = torch.einsum("bld,bd->bl", prompt.x, prompt.query)
    return rate * (prompt.y * scores).mean(1)


def debiased_gradient_step(prompt: Prompt, rate: float) -> Float[Tensor, "b"]:
    r"""`gradient_step` without the means: $\frac{\eta}{L} \sum_l (y_l - \bar y)\, x_l^\top x_q$."""
    return gradient_step(prompt._replace(y=prompt.y - prompt.y.mean(1, keepdim=True)), rate)


def softmax_estimate(prompt: Prompt, omega: Float[Tensor, "h"], mu: Float[Tensor, "h"]) -> Float[Tensor, "b"]:
    r"""$\sum_h \mu_h\, y^\top \mathrm{softmax}(\omega_h X x_q)$: what softmax heads of the pattern found by training compute."""
    heads = len(omega)
    q = omega[:, None, None] * prompt.query[:, None, None]
    k, v = (part[:, None].expand(-1, heads, -1, -1) for part in (prompt.x, prompt.y[..., None]))
    return attention(q, k, v, scale=1.0)[..., 0, 0] @ mu


def ridge(prompt: Prompt, penalty: float) -> Float[Tensor, "b"]:
    r"""$x_q^\top (X^\top X + \lambda I)^{-1} X^\top y$; with $\lambda = \sigma^2 d$ the mean of the posterior."""
    x = prompt.x
    gram = x.mT @ x + penalty * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.lstsq(gram, (x.mT @ prompt.y[..., None])).solution[..., 0]
    return (weights * prompt.query).sum(-1)


def optimal_mu(omega: Float[Tensor, "h"], dim: int, length: int, variance: float) -> Float[Tensor, "h"]:
    r"""The $\mu$ that makes `approximate_loss` least, for noise of this variance."""
    return torch.linalg.solve(_second_moment(omega, dim, length, variance), omega)


def approximate_loss(
    omega: Float[Tensor, "h"], mu: Float[Tensor, "h"], dim: int, length: int, variance: float
) -> Float[Tensor, ""]:
    r"""The expected squared error of `softmax_estimate` for many examples.

    $$1 + \sigma^2 - 2\mu^\top\omega + \mu^\top\Bigl(\omega\omega^\top + \frac{1+\sigma^2}{L}\,e^{d\omega\omega^\top}\Bigr)\mu$$

    with the exponential of each entry.
    """
    return 1.0 + variance - 2.0 * (mu @ omega) + mu @ _second_moment(omega, dim, length, variance) @ mu


def ridge_loss_limit(ratio: float, variance: float) -> float:
    r"""Squared error of the best `ridge` as $d, L \to \infty$ with $d/L$ being ``ratio``."""
    inverse = (1.0 - ratio) / ratio
    return 0.5 * (variance - inverse + math.sqrt(4.0 * variance + (variance + inverse) ** 2))


def _second_moment(omega: Float[Tensor, "h"], dim: int, length: int, variance: float) -> Float[Tensor, "h h"]:
    outer = omega[:, None] * omega
    return outer + (1.0 + variance) / length * (dim * outer).exp()
