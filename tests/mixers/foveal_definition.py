"""Attention to a neighbourhood and a pooled map under one softmax, written as its equations read."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _bins(side: int, cells: int) -> list[range]:
    return [range(j * side // cells, math.ceil((j + 1) * side / cells)) for j in range(cells)]


def _cpb(mixer, cell: tuple[int, int], bins: tuple[range, range], grid: tuple[int, int]) -> Tensor:
    """Offsets in float32 as the authors', and ours, are tabulated."""
    spans = [max((mixer.pool_bias.span or side) - 1, 1) for side in grid]
    delta = torch.tensor([at - (each[0] + each[-1]) / 2 for at, each in zip(cell, bins, strict=True)])
    delta = delta / torch.tensor(spans) * 8
    delta = delta.sign() * torch.log2(delta.abs() + 1) / math.log2(8)
    inner = (mixer.pool_bias.fc1.weight @ delta.double() + mixer.pool_bias.fc1.bias).relu()
    return mixer.pool_bias.fc2.weight @ inner + mixer.pool_bias.fc2.bias


def foveal_heads(mixer, x: Tensor, grid: tuple[int, int], sides: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    """The head outputs (b, n, h, d) before the output projection, cell by cell; 0 at masked cells."""
    (height, width), heads, r = grid, mixer.num_heads, mixer.window // 2
    d = x.shape[2] // heads
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    pools = [(rows, columns) for rows in _bins(height, sides[0]) for columns in _bins(width, sides[1])]
    examples = []
    for example, here in zip(x, real, strict=True):
        q, k, v = mixer.q_proj(example), mixer.k_proj(example), mixer.v_proj(example)
        local, far = F.gelu(mixer.pool_proj(example)), []
        for bins in pools:
            cells = [row * width + column for row in bins[0] for column in bins[1] if here[row * width + column]]
            if cells:
                far.append((bins, mixer.pool_norm(sum(local[c] for c in cells) / len(cells))))
        rows = []
        for i in range(height * width):
            if not here[i]:
                rows.append(example.new_zeros(heads, d))
                continue
            near = []
            for o in range(mixer.window**2):
                row, column = i // width + o // mixer.window - r, i % width + o % mixer.window - r
                if 0 <= row < height and 0 <= column < width and here[row * width + column]:
                    near.append((o, row * width + column))
            parts = []
            for h in range(heads):
                s = slice(h * d, (h + 1) * d)
                unit = q[i, s] / q[i, s].norm()
                query = unit if mixer.cosine.query_embedding is None else unit + mixer.cosine.query_embedding[h, 0]
                query = query * torch.log(1 + torch.exp(mixer.cosine.temperature[h, 0, 0]))
                query = query * math.log(len(near) + len(far)) if mixer.cosine.length_scale else query
                powers = [torch.exp(query @ k[j, s] / k[j, s].norm() + mixer.window_bias[h, o]) for o, j in near]
                values = [v[j, s] for _, j in near]
                for bins, token in far:
                    key, bias = mixer.k_proj(token)[s], _cpb(mixer, (i // width, i % width), bins, grid)[h]
                    powers.append(torch.exp(query @ key / key.norm() + bias))
                    values.append(mixer.v_proj(token)[s])
                out = sum(p * value for p, value in zip(powers, values, strict=True)) / sum(powers)
                if mixer.offset_keys is not None:
                    for o, j in near:
                        out = out + (unit @ mixer.offset_keys[h, :, o] + mixer.offset_bias[h, 0, o]) * v[j, s]
                parts.append(out)
            rows.append(torch.stack(parts))
        examples.append(torch.stack(rows))
    return torch.stack(examples)
