"""Weights by which a decay acts inside chunks of one length and between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# exp of this is 0 in every dtype, and unlike exp(-inf * lag) it's 1, not NaN, at lag 0
LOWEST = -1e4


@dataclass(frozen=True)
class Decay:
    r"""For chunks of ``size`` tokens, local index $r = 1 \dots$ ``size``, decay $\lambda$ and scale $s$ of a group of heads.

    Powers of $\lambda$ are exponentials of non-positive numbers, never quotients, so that nothing overflows.

    Args:
        within: $s\,\lambda^{r-c}$ for $r \ge c$, otherwise 0: token c as read by token r.
        read: $s\,\lambda^r$, the state before the chunk as read by token r; None where it is 1 throughout.
        write: $\lambda^{size-c}$, token c in the state after the chunk; None where it is 1 throughout.
        log_chunk: $size \cdot \log\lambda$ of each head.
    """

    within: Float[Tensor, "#g 1 size size"]
    read: Float[Tensor, "#g 1 #size 1"] | None
    write: Float[Tensor, "g 1 size 1"] | None
    log_chunk: Float[Tensor, " g"]

    @classmethod
    def build(cls, log_decay: Float[Tensor, " g"] | None, like: Float[Tensor, "g n d"], size: int, scale: float) -> Decay:
        """The weights for the heads of ``like``, in its dtype and on its device."""
        if log_decay is None:
            within = like.new_full((1, 1, size, size), scale).tril_()
            read = None if scale == 1.0 else like.new_full((1, 1, 1, 1), scale)
            return cls(within, read, None, like.new_zeros(like.shape[0]))
        log_decay = log_decay.clamp_min(LOWEST)
        index = torch.arange(size, dtype=like.dtype, device=like.device)
        lag = (index[:, None] - index).clamp_min_(0)
        within = (log_decay[:, None, None, None] * lag).exp_().tril_()
        write = within[:, :, -1, :, None].clone()
        if scale != 1.0:
            within *= scale
        read = within[:, :, :, :1] * log_decay.exp()[:, None, None, None]
        return cls(within, read, write, log_decay * size)

    def across(self, chunks: int) -> Float[Tensor, "g chunks_1 chunks_1"]:
        r"""$\lambda^{size\,(i-j)}$ for $i \ge j$: what chunk i + 1 finds of the write of chunk j (j = 0: the first state)."""
        index = torch.arange(chunks + 1, dtype=self.log_chunk.dtype, device=self.log_chunk.device)
        lag = (index[:, None] - index).clamp_min_(0)
        return (self.log_chunk[:, None, None] * lag).exp_().tril_()
