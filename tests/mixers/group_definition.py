"""Attention in groups of cells by loops: who is in which group, and what each pair of a group adds to its logit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from attnlab import Mixer
from mixers.definition import split_heads

Cell = tuple[int, ...]


def cells_of(grid: Sequence[int]) -> list[Cell]:
    """All cells, row-major."""
    return list(itertools.product(*(range(n) for n in grid)))


def in_groups(
    mixer: Mixer,
    grid: Sequence[int],
    group: Callable[[int, Cell], Hashable],
    bias: Callable[[int, Cell, Cell], Tensor] | None = None,
    local: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> Callable[[Tensor], Tensor]:
    """Softmax attention among the cells for which ``group(head, cell)`` is the same.

    Args:
        mixer: whose projections are used.
        grid: its sides.
        group: of a cell, for each head.
        bias: of (head, query, key).
        local: what is added to the heads, from the values of each head.
    """
    cells = cells_of(grid)

    def attend(x: Tensor) -> Tensor:
        q, k, v = (split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        heads = []
        for h in range(mixer.num_heads):
            rows = []
            for i, query in enumerate(cells):
                keys = [j for j, key in enumerate(cells) if group(h, key) == group(h, query)]
                logits = torch.einsum("bd,bmd->bm", q[h][:, i], k[h][:, keys]) / math.sqrt(q[h].shape[-1])
                if bias is not None:
                    logits = logits + torch.stack([bias(h, query, cells[j]) for j in keys])
                rows.append(torch.einsum("bm,bmd->bd", logits.softmax(-1), v[h][:, keys]))
            heads.append(torch.stack(rows, dim=1))
        if local is not None:
            heads = [a + b for a, b in zip(heads, local(v), strict=True)]
        return mixer.out_proj(torch.cat(heads, dim=-1))

    return attend
