"""Targets of one query and a set of keys, invariant to the order of the keys, and the random-feature MLP beside attention.

Regression targets: they do not fit the contract of `attnlab.tasks`, whose targets are classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def power_of_keys(keys: Tensor, beta: Tensor, power: int) -> Tensor:
    """mean_i <beta, x_i>^p."""
    return (keys @ beta).pow(power).mean(1)


def correlated_keys(query: Tensor, keys: Tensor, beta: Tensor, power: int) -> Tensor:
    """mean_i <x_0, x_i>^p <beta, x_i>."""
    return ((keys @ query[:, :, None]).squeeze(-1).pow(power) * (keys @ beta)).mean(1)


def correlated_tensor(query: Tensor, keys: Tensor, tensor: Tensor, power: int) -> Tensor:
    """mean_i <x_0, x_i>^p <x_i x x_i, A>, a quadratic form in the key."""
    forms = torch.einsum("bic,cd,bid->bi", keys, tensor, keys)
    return ((keys @ query[:, :, None]).squeeze(-1).pow(power) * forms).mean(1)


def cosine_of_correlation(query: Tensor, keys: Tensor, tensor: Tensor) -> Tensor:
    """mean_i cos(<x_0, x_i>) <x_i x x_i, G>."""
    forms = torch.einsum("bic,cd,bid->bi", keys, tensor, keys)
    return ((keys @ query[:, :, None]).squeeze(-1).cos() * forms).mean(1)


def random_mlp_features(query: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """relu(<w_m, vec(x_0, ..., x_N, 1)>) / M for the rows of ``weights``."""
    flat = torch.cat((query, keys.flatten(1), torch.ones_like(query[:, :1])), dim=1)
    return (flat @ weights.T).relu() / len(weights)
