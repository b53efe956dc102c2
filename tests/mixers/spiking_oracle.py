"""Spiking neurons and layers by their equations, one neuron and one step at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Step(torch.autograd.Function):
    """[u >= 0], whose gradient is the derivative of sigmoid(alpha u) or arctan(pi alpha u / 2) / pi."""

    @staticmethod
    def forward(ctx, excess, surrogate, alpha):
        ctx.save_for_backward(excess)
        ctx.kind = surrogate, alpha
        return (excess >= 0).to(excess.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (excess,), (surrogate, alpha) = ctx.saved_tensors, ctx.kind
        if surrogate == "sigmoid":
            slope = alpha * torch.exp(-alpha * excess) / (1 + torch.exp(-alpha * excess)) ** 2
        else:
            slope = alpha / 2 / (1 + (math.pi * alpha * excess / 2) ** 2)
        return gradient * slope, None, None


def fire(currents: Tensor, threshold: float, tau: float = 2.0, surrogate: str = "sigmoid", alpha: float = 4.0) -> Tensor:
    """Spikes of neurons with a current (t, ...)."""
    voltage, spikes = torch.zeros_like(currents[0]), []
    for current in currents:
        charged = voltage + (current - voltage) / tau
        fired = Step.apply(charged - threshold, surrogate, alpha)
        voltage = torch.where(fired.detach() == 1, torch.zeros_like(charged), charged)
        spikes.append(fired)
    return torch.stack(spikes)


def layer(part, x: Tensor, real: Tensor) -> Tensor:
    """The current of a `SpikingLinear` from (t, b, n, c): its norm over the real rows in training, 0 at the others."""
    linear, norm = part.linear.conv, part.linear.norm
    y = torch.einsum("tbnc,ec->tbne", x, linear.weight[..., 0])
    y = y if linear.bias is None else y + linear.bias
    rows = y[:, real].flatten(0, 1)
    mean, variance = norm.running_mean, norm.running_var
    if part.training:
        mean = rows.mean(0)
        variance = (rows - mean).square().mean(0)
    y = (y - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    return y * real[..., None].to(y.dtype)


def disturb(module: torch.nn.Module) -> None:
    """Give the norms running statistics of their own."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 1.5)
