"""The adjacency of attention as a graph, entry by entry from its equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixers.definition import split_heads


def _softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def shape_row(row: list[Tensor], name: str, t: float = 0.2, b: float = 10.0, f: float = 0.1) -> list[Tensor]:
    """What becomes of the allowed entries of a row."""
    one, zero = torch.ones_like(row[0]), torch.zeros_like(row[0])
    if name == "top_k":
        k = max(1, int(f * len(row)))
        best = sorted(range(len(row)), key=lambda j: (-float(row[j].detach()), j))[:k]
        return [one if j in best else zero for j in range(len(row))]
    rules = {
        "none": lambda a: a,
        "relu": lambda a: a - t if a > t else zero,
        "silu": lambda a: (a - t) * _sigmoid(a - t),
        "softplus": lambda a: _softplus(a - t),
        "sharp_softplus": lambda a: _softplus(b * (a - t)) / b,
        "sigmoid": lambda a: _sigmoid(b * (a - t)),
        "binary": lambda a: one if a > t else zero,
        "flow": lambda a: _sigmoid(5 * a) * _sigmoid(50 * (a - t)),
    }
    return [rules[name](a) for a in row]


def _normalized(row: list[Tensor], normalizer: str) -> list[Tensor]:
    if normalizer == "identity":
        return row
    total = sum(torch.exp(score) for score in row)
    return [torch.exp(score) / total for score in row]


def adjacency(mixer, x: Tensor, mask: Tensor) -> dict[tuple[int, int, int], dict[int, Tensor]]:
    """Entries by (example, head, query) and key, allowed pairs alone."""
    heads, width = mixer.num_heads, mixer.head_dim
    how = (mixer.shaping.name, mixer.shaping.threshold, mixer.shaping.sharpness, mixer.shaping.fraction)
    alpha = 1.0 if mixer.sharpening is None else mixer.sharpening
    pairs = [(split_heads(mixer.q_proj(x), heads), split_heads(mixer.k_proj(x), heads))]
    if mixer.difference is not None:
        pairs.append((split_heads(mixer.q_proj_2(x), heads), split_heads(mixer.k_proj_2(x), heads)))
    found = {}
    for e in range(x.shape[0]):
        for h in range(heads):
            for i in range(x.shape[1]):
                keys = [j for j in range(x.shape[1]) if mask[e, j] and (j <= i or not mixer.causal)]
                rows = []
                for qs, ks in pairs:
                    if mixer.scorer is None:
                        scores = [(qs[h][e, i] * ks[h][e, j]).sum() / math.sqrt(width) for j in keys]
                    else:
                        first = torch.cat((mixer.q_proj.weight, mixer.k_proj.weight), dim=1)
                        scores = []
                        for j in keys:
                            inner = first @ torch.cat((x[e, i], x[e, j])) + mixer.q_proj.bias
                            scores.append(mixer.scorer.weight[h] @ (inner * _sigmoid(inner)) + mixer.scorer.bias[h])
                    rows.append(_normalized([alpha * score / mixer.temperature for score in scores], mixer.normalizer))
                row = rows[0]
                if len(rows) == 2:
                    row = [a - mixer.difference * b for a, b in zip(*rows, strict=True)]
                found[e, h, i] = dict(zip(keys, shape_row(row, *how) if keys else [], strict=True))
    return found


def perceptron(mlp, head: int, z: Tensor) -> Tensor:
    """One head's two layers on a vector."""
    y = z @ mlp.up[head] + mlp.up_bias[head, 0]
    if mlp.norm is not None:
        y = y / torch.sqrt((y**2).mean() + 1e-6) * mlp.norm[head, 0]
    return (y * _sigmoid(y)) @ mlp.down[head] + mlp.down_bias[head, 0]
