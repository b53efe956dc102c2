"""Where tokens stand when chunks are counted over the real tokens of each example, from the beginning of its sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Alignment:
    """A slot for every token, in whole chunks: real tokens one behind the other, after those that the first chunk has already.

    Args:
        slots: of each token (b, n); masked tokens have the slot behind the last.
        place: slots of the first chunk that were filled before (b,).
        count: real tokens (b,).
        length: slots, a multiple of the chunk.
    """

    slots: Int[Tensor, "b n"]
    place: Int[Tensor, "b"]
    count: Int[Tensor, "b"]
    length: int

    @classmethod
    def of(cls, place: Int[Tensor, "b"], mask: Bool[Tensor, "b n"] | None, n: int, chunk: int) -> Alignment:
        """The slots of n tokens where ``place`` tokens of a chunk came before."""
        length = -(-(n + chunk - 1) // chunk) * chunk
        if mask is None:
            slots, count = place[:, None] + torch.arange(n, device=place.device), torch.full_like(place, n)
        else:
            slots = (place[:, None] + mask.cumsum(1) - 1).masked_fill(~mask, length)
            count = mask.sum(1)
        return cls(slots, place, count, length)

    @property
    def live(self) -> Bool[Tensor, "b s"]:
        """True at slots that a token of this call fills."""
        index = torch.arange(self.length, device=self.slots.device)
        return (index >= self.place[:, None]) & (index < (self.place + self.count)[:, None])

    def spread(self, x: Float[Tensor, "b h n d"], fill: float = 0.0) -> Float[Tensor, "b h s d"]:
        """Tokens in their slots, ``fill`` in the others."""
        index = self.slots[:, None, :, None].expand_as(x)
        return x.new_full((*x.shape[:2], self.length + 1, x.shape[3]), fill).scatter(2, index, x)[:, :, : self.length]

    def collect(self, x: Float[Tensor, "b h s d"]) -> Float[Tensor, "b h n d"]:
        """What stands in the tokens' slots; anything at masked tokens."""
        index = self.slots.clamp(max=self.length - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)
