"""Softmax attention over keys that a rule names for each query and head, written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixers.definition import split_heads


def over_keys(mixer, keys: Callable[[int, int, int], list[int]]) -> Callable[[Tensor], Tensor]:
    """``keys(head, i, n)`` are those of query i; a query without any gives 0 before the output projection."""

    def attend(x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        heads = []
        for h in range(mixer.num_heads):
            rows = []
            for i in range(n):
                index = keys(h, i, n)
                logits = torch.einsum("bd,bmd->bm", q[h][:, i], k[h][:, index]) / math.sqrt(mixer.head_dim)
                rows.append(torch.einsum("bm,bmd->bd", logits.softmax(-1), v[h][:, index]))
            heads.append(torch.stack(rows, dim=1))
        return mixer.out_proj(torch.cat(heads, dim=-1))

    return attend
