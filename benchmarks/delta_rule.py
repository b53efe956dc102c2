"""The delta rule in pairs with SDPA; set GOMP_SPINCOUNT=20000 on a machine that is not idle."""

from __future__ import annotations

import torch
from pairs import HEADS, WIDTH, compare, step
from torch import Tensor
from torch.nn.functional import normalize

from attnlab.ops.delta_rule import delta_rule


def draw(length: int) -> list[Tensor]:
    """q, k of length 1, v, beta."""
    q, k, v = (torch.randn(1, HEADS, length, WIDTH) for _ in range(3))
    return [q, normalize(k, dim=-1), v, torch.rand(1, HEADS, length)]


def main() -> None:
    """Print the ratios."""
    torch.manual_seed(0)
    compare("delta rule", delta_rule, draw)
    step("delta rule", delta_rule, draw(1), torch.zeros(1, HEADS, WIDTH, WIDTH))


if __name__ == "__main__":
    main()
