"""Memory that the pieces of a long computation use again."""

from __future__ import annotations

import math

from torch import Tensor


class Buffers:
    """Memory by name, used again by every chunk: fresh memory costs more than what is computed in it."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Memory of that name for a tensor of ``shape``, with anything in it."""
        size = math.prod(shape)
        if name not in self.flat or self.flat[name].numel() < size:
            self.flat[name] = self.like.new_empty(size)
        return self.flat[name][:size].view(shape)
