"""Lines put into a text at given places, for a whole batch at once."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def insert(hay: Int[Tensor, "b t"], lines: list[Int[Tensor, "b l"]], places: Int[Tensor, "b k"]) -> Int[Tensor, "b n"]:
    """Each line put before the byte of ``hay`` that its place names; of lines with the same place, the first comes first."""
    count, room = hay.shape
    pieces = torch.cat((hay, *lines), 1)
    of_hay = 2 * torch.arange(room).expand(count, -1) + 1
    of_lines = (2 * places).repeat_interleave(lines[0].shape[1], 1)
    order = torch.cat((of_hay, of_lines), 1).argsort(dim=1, stable=True)
    return pieces.gather(1, order)
