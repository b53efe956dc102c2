r"""Weights by which decays that depend on the token act inside chunks and between them.

With $b_r$ the sum of the chunk's first r logarithms, token r reads token c with $e^{b_r - b_c}$, the state before the chunk with
$e^{b_r}$, and the state after it holds token c with $e^{b_C - b_c}$; all are at most 1. One decay for all channels weighs the
scores of a chunk after the product. A decay a channel weighs inside the product, for which $e^{b_r - b_c}$ is split at the middle
of the chunk, $e^{b_r - b_m} e^{b_m - b_c}$: one factor may exceed 1 by what half a chunk decays, which `chunk_size` bounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

SHARED, LARGEST = 64, 32  # tokens of a chunk with one decay for all channels, and at most with one a channel

Chunks = Float[Tensor, "chunks size _"]
Scores = Float[Tensor, "chunks size size"]


def bounded(log_decay: Float[Tensor, "bh n w"]) -> Float[Tensor, "bh n w"]:
    """No logarithm below what is 0 as a decay, for sums of -inf would have no differences."""
    return log_decay.clamp_min(-750.0 if log_decay.dtype == torch.float64 else -110.0)


def chunk_size(log_decay: Float[Tensor, "bh n w"]) -> int:
    """Tokens of a chunk: a power of 2 such that no weight of half a chunk overflows."""
    if log_decay.shape[-1] == 1:
        return SHARED
    room = 700.0 if log_decay.dtype == torch.float64 else 80.0
    strongest = float(-log_decay.amin()) if log_decay.numel() else 0.0
    size = LARGEST
    while size > 1 and size // 2 * strongest > room:
        size //= 2
    return size


class Gates(ABC):
    """The weights of a tile's chunks.

    Args:
        log_decay: of every token, (chunks, size, w).
        scale: s.
    """

    def __init__(self, log_decay: Chunks, scale: float) -> None:
        self.scale, self.width = scale, log_decay.shape[-1]
        # the differences of the sums are small beside them; where they are few, they are exact
        self.sums = log_decay.cumsum(1, dtype=torch.float64 if self.width == 1 else None)
        self.read = self.sums.to(log_decay.dtype).exp()
        self.write = (self.sums[:, -1:] - self.sums).to(log_decay.dtype).exp_()
        self.chunk = self.read[:, -1]
        if scale != 1.0:
            self.read = self.read * scale

    @abstractmethod
    def scores(self, q: Chunks, k: Chunks) -> Scores:
        """What token r reads of token c."""

    @abstractmethod
    def pull(self, q: Chunks, k: Chunks, grad: Scores, grad_q: Chunks, grad_k: Chunks) -> None:
        """Add what the gradient of the scores, as they come from a product, gives to the gradients of q and k."""

    def collect(self, towards: Chunks, after: Float[Tensor, "chunks d"]) -> Chunks:
        """Gradient of the logarithms: of the sums up to each token, ``towards``, and of the chunk's, ``after``, (chunks, d)."""
        if self.width == 1:
            towards, after = towards.sum(-1, keepdim=True), after.sum(-1, keepdim=True)
        size = towards.shape[1]
        later = towards.new_ones(size, size).triu_()
        return later @ towards + after.unsqueeze(1)


class SharedGates(Gates):
    """One decay for all channels."""

    def __init__(self, log_decay: Chunks, scale: float) -> None:
        super().__init__(log_decay, scale)
        self.within = (self.sums - self.sums.mT).tril_().to(log_decay.dtype).exp_().tril_()
        if scale != 1.0:
            self.within *= scale

    def scores(self, q: Chunks, k: Chunks) -> Scores:
        """The products, weighed."""
        return torch.bmm(q, k.mT).mul_(self.within)

    def pull(self, q: Chunks, k: Chunks, grad: Scores, grad_q: Chunks, grad_k: Chunks) -> None:
        """Through the weights."""
        grad.mul_(self.within)
        grad_q.baddbmm_(grad, k)
        grad_k.baddbmm_(grad.mT, q)


class ChannelGates(Gates):
    """A decay a channel."""

    def __init__(self, log_decay: Chunks, scale: float) -> None:
        super().__init__(log_decay, scale)
        centred = self.sums - self.sums[:, (self.sums.shape[1] - 1) // 2, None]
        self.fall = centred.neg().exp_()
        self.rise = centred.exp_()
        if scale != 1.0:
            self.rise *= scale

    def scores(self, q: Chunks, k: Chunks) -> Scores:
        """The products of what was weighed."""
        return torch.bmm(q * self.rise, (k * self.fall).mT).tril_()

    def pull(self, q: Chunks, k: Chunks, grad: Scores, grad_q: Chunks, grad_k: Chunks) -> None:
        """Each side's weight on what the other side was weighed to."""
        grad.tril_()
        grad_q.addcmul_(torch.bmm(grad, k * self.fall), self.rise)
        grad_k.addcmul_(torch.bmm(grad.mT, q * self.rise), self.fall)


def gates(log_decay: Chunks, scale: float) -> Gates:
    """Weights for one decay a token or one a channel, by the last dimension."""
    return (SharedGates if log_decay.shape[-1] == 1 else ChannelGates)(log_decay, scale)
