"""Recall from a queue of memories by one attention whose values are the memories themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.ops.attention import attention, attention_map

SCALES = {"root": -0.5, "width": -1.0}
"""Powers of the width that the scores are multiplied by."""


class MemoryRecall(nn.Module):
    r"""$m = \mathrm{softmax}(s\,(q W_q^\top)(P W_k^\top)^\top)\, P$, $s = h^{-1/2}$ (He et al. 2024, HMT, section 3.2).

    Without memories m is 0, with a zero gradient.

    Args:
        dim: width of the summary q and of the memories P.
        hidden: h, width of queries and keys; by default ``dim``.
        scale: "root" for $h^{-1/2}$, or "width" for $h^{-1}$, which the authors take in training from a width of 4096 on.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an unknown scale or a width below 1.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        scale: str = "root",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        if scale not in SCALES:
            raise ValueError(f"scale: expected one of {list(SCALES)}, got {scale!r}")
        self.scale = hidden ** SCALES[scale]
        self.q_proj = nn.Linear(dim, hidden, bias=False, device=device, dtype=dtype)
        self.k_proj = nn.Linear(dim, hidden, bias=False, device=device, dtype=dtype)

    def forward(
        self, query: Float[Tensor, "b n c"], memory: Float[Tensor, "b m c"], *, mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """What is recalled for each query; ``mask`` is True at memories that there are."""
        q, k = self.q_proj(query)[:, None], self.k_proj(memory)[:, None]
        return attention(q, k, memory[:, None], scale=self.scale, key_mask=mask)[:, 0]

    def weights(
        self, query: Float[Tensor, "b n c"], memory: Float[Tensor, "b m c"], *, mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b n m"]:
        """The weight of each memory."""
        q, k = self.q_proj(query)[:, None], self.k_proj(memory)[:, None]
        return attention_map(q, k, scale=self.scale, key_mask=mask)[:, 0]


def recalled_age(weights: Float[Tensor, "b n m"]) -> Int[Tensor, "b n"]:
    """How many segments back the memory with the largest weight is; 1 is the last."""
    return weights.shape[-1] - weights.argmax(-1)


def retrieval_loss(
    weights: Float[Tensor, "b n m"], relevant: Float[Tensor, "b n m"] | Bool[Tensor, "b n m"], *, twice: bool = False
) -> Float[Tensor, ""]:
    r"""Cross-entropy of the weights of recall against the memories that are known to matter, $-\sum_j r_j \log w_j$ on average.

    Args:
        weights: of `MemoryRecall.weights`.
        relevant: non-negative, brought to sum 1 here; a row of zeros counts nothing.
        twice: as the authors' code has it: the weights are taken for logits, and a second softmax comes over them.
    """
    target = relevant.to(weights.dtype)
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    if twice:
        return F.cross_entropy(weights.flatten(0, 1), target.flatten(0, 1))
    # 0 log 0 is 0 where nothing is relevant, and a large number, not an infinite one, where something is
    log = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    return -(target * log).sum(-1).mean()
