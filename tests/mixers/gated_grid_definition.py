"""What RALA and MALA share, by its definition: projections, rotation by cell, convolution of the values, gate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

DIM, HEADS = 16, 2
D = DIM // HEADS


def _cell(index: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    return next(itertools.islice(itertools.product(*(range(side) for side in grid)), index, None))


def turned(x: Tensor, index: int, grid: tuple[int, ...]) -> Tensor:
    """Adjacent pairs of channels turned: each axis its share of the channels, by angles from 1 down to 1e-4 a cell."""
    pairs = len(x) // (2 * len(grid))
    out = []
    for axis, place in enumerate(_cell(index, grid)):
        for t in range(pairs):
            angle = place * 10000.0 ** -(t / (pairs - 1) if pairs > 1 else 0.0)
            a, b = x[2 * (axis * pairs + t)], x[2 * (axis * pairs + t) + 1]
            out += [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
    return torch.stack(out)


def _convolved(mixer, v: Tensor, grid: tuple[int, ...], real: list[int]) -> Tensor:
    """Depthwise, cell by cell, zero outside the grid and at masked cells."""
    weight, bias = mixer.lepe.conv.weight[:, 0], mixer.lepe.conv.bias
    cells = [_cell(i, grid) for i in range(len(v))]
    half, rows = weight.shape[-1] // 2, []
    for here in cells:
        total = bias
        for j in real:
            offset = [there - place + half for there, place in zip(cells[j], here, strict=True)]
            if all(0 <= o <= 2 * half for o in offset):
                total = total + weight[(slice(None), *offset)] * v[j]
        rows.append(total)
    return torch.stack(rows)


def layer(mixer, x: Tensor, grid: tuple[int, ...], mask: Tensor | None, head: Callable[..., Tensor]) -> Tensor:
    """The layer around ``head(q, k, v, grid, real)``, which takes the features of one head of one example."""
    y = []
    for b, example in enumerate(x if mask is None else x * mask[..., None]):
        real = [i for i in range(len(example)) if mask is None or mask[b, i]]
        q, k, v = (f(example).view(-1, HEADS, D) for f in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        q, k = (torch.where(t > 0, t + 1, torch.exp(t)) for t in (q, k))
        heads = [head(q[:, h], k[:, h], v[:, h], grid, real) for h in range(HEADS)]
        out = torch.cat(heads, -1)
        if mixer.lepe is not None:
            out = out + _convolved(mixer, v.flatten(1), grid, real)
        if mixer.gate_proj is not None:
            out = out * mixer.gate_proj(example)
        y.append(mixer.out_proj(out))
    found = torch.stack(y)
    return found if mask is None else found * mask[..., None]
