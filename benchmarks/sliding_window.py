"""A causal window of 256 keys in pairs with SDPA, and with sinks: `GOMP_SPINCOUNT=20000 python benchmarks/sliding_window.py`."""

from __future__ import annotations

import torch
from pairs import HEADS, WIDTH, compare
from torch import Tensor

from attnlab.ops.sliding_window import sliding_window_attention


def draw(length: int) -> list[Tensor]:
    """q, k, v."""
    return [torch.randn(1, HEADS, length, WIDTH) for _ in range(3)]


def op(num_sinks: int) -> object:
    """The op as `pairs` calls it, with the output also in the place of a state."""

    def run(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
        out = sliding_window_attention(q, k, v, left=255, num_sinks=num_sinks, backend=backend)
        return out, out

    return run


def main() -> None:
    """Print the ratios."""
    torch.manual_seed(0)
    compare("window 256", op(0), draw)
    compare("window 256, 4 sinks", op(4), draw, lengths=(4096,))


if __name__ == "__main__":
    main()
