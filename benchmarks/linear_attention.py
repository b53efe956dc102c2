"""Causal linear attention with and without decay, in pairs with SDPA; set GOMP_SPINCOUNT=20000 on a machine that is not idle."""

from __future__ import annotations

from functools import partial

import torch
from pairs import HEADS, WIDTH, compare, step
from torch import Tensor

from attnlab.ops.linear_attention import linear_attention


def draw(length: int) -> list[Tensor]:
    """q, k, v."""
    return [torch.randn(1, HEADS, length, WIDTH) for _ in range(3)]


def main() -> None:
    """Print the ratios."""
    torch.manual_seed(0)
    state = torch.zeros(1, HEADS, WIDTH, WIDTH)
    decay = -torch.logspace(0, -8, HEADS, base=2.0)
    for name, op in (("decay", partial(linear_attention, log_decay=decay)), ("no decay", linear_attention)):
        compare(f"linear, {name}", op, draw)
        step(f"linear, {name}", op, draw(1), state)


if __name__ == "__main__":
    main()
