"""One layer of full-width heads on in-context linear regression, and the closed-form estimators that it comes to be."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from attnlab.ops.attention import attention
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
from golden.recording import Recording

PROVES = ("task:in_context_regression",)


def _layer(recording: Recording) -> dict[str, Tensor]:
    weights = recording.parameters("attention_layer.")
    z, query = recording.leaf("in/z"), recording["in/z_q"]
    heads = weights["q_proj.weight"].shape[0] // z.shape[-1]
    q, k, v = (
        rearrange(x @ weights[f"{name}_proj.weight"].T, "b n (h d) -> b h n d", h=heads)
        for x, name in ((query, "q"), (z, "k"), (z, "v"))
    )
    prediction = rearrange(attention(q, k, v), "b h n d -> b n (h d)") @ weights["o_proj.weight"].T
    (slope,) = torch.autograd.grad((prediction * recording["in/w"]).sum(), z)
    # row vectors are multiplied from the right: each head's matrix is the transposed of its rows
    to_q, to_k, to_v = (rearrange(weights[f"{name}_proj.weight"], "(h d) c -> h c d", h=heads) for name in "qkv")
    out = rearrange(weights["o_proj.weight"], "o (h d) -> h d o", h=heads)
    return {
        "out/prediction": prediction,
        "out/mse": (prediction - recording["in/y_q"]).square().mean(),
        "grad/z": slope,
        "out/KQ": to_q @ to_k.mT,
        "out/OV": to_v @ out,
    }


def _estimators(recording: Recording) -> dict[str, Tensor]:
    prompt = Prompt(recording["in/Z_x"].T[None], recording["in/Z_y"][None], recording["in/x_q"][None])
    _, length, dim = prompt.x.shape
    omega, variance = recording["in/omega"], float(recording["in/noise_var"])
    mu = optimal_mu(omega, dim, length, variance)
    rate = float(2.0 * omega[0] * mu[0])
    limits = [ridge_loss_limit(float(ratio), variance) for ratio in recording["in/xi"]]
    return {
        "out/optimal_mu": mu,
        "out/approx_loss": approximate_loss(omega, mu, dim, length, variance),
        "out/softmax_estimator": softmax_estimate(prompt, omega, mu)[0],
        "out/gd": gradient_step(prompt, rate)[0],
        "out/debiased_gd": debiased_gradient_step(prompt, rate)[0],
        "out/ridge": ridge(prompt, variance * dim)[0],
        "out/ridge_loss_limit": torch.tensor(limits, dtype=recording.dtype),
    }


def run(recording: Recording) -> dict[str, Tensor]:
    """The layer with its gradient and matrices, and every estimator."""
    return _layer(recording) | _estimators(recording)
