"""Attention diversity: tokens should not all attend to the same few."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.objectives.contract import Objective
from attnlab.objectives.registry import objectives


@objectives.register("attention_diversity", paper="tap-adl")
class AttentionDiversity(Objective):
    r"""Cosine between each token's attention and the mean attention (Guo et al. 2023).

    With $M \in \mathbb{R}^{n \times m}$ a layer's map, mean over its heads, $\bar m$ the mean of its rows, and
    $[\,\cdot\,]_t$ setting to 0 what does not exceed $t/m$,

    $$\mathcal{L} = \frac{1}{L} \sum_l \operatorname{mean}_{b, i} \cos\big([\bar m]_t,\, [M_i]_t\big)$$

    The cosine to the mean bounds the mean cosine of all pairs of rows in O(n m) instead of O(n^2 m). A row that the threshold
    empties counts 0. The authors add it to the loss of the task with weight 1.

    Args:
        threshold: t, in units of uniform attention; the authors use 2.

    Raises:
        ValueError: for a negative threshold; for maps that are not (b, h, n, m), or a mask that does not fit them.

    Differs from the paper: masked queries are in no mean, and m counts real tokens (in self-attention; keys of a context are
    all counted). A batch of one example is averaged like any other.
    """

    def __init__(self, *, threshold: float = 2.0) -> None:
        super().__init__()
        if threshold < 0:
            raise ValueError(f"threshold: expected at least 0, got {threshold}")
        self.threshold = threshold

    def measure(self, layers: Sequence[Tensor], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, ""]:
        """The mean over the layers."""
        for maps in layers:
            if maps.dim() != 4:
                raise ValueError(f"recorded: expected maps (b, h, n, m), got shape {tuple(maps.shape)}")
            if mask is not None and (maps.shape[0], maps.shape[2]) != tuple(mask.shape):
                raise ValueError(f"mask: expected shape {(maps.shape[0], maps.shape[2])} as the maps, got {tuple(mask.shape)}")
        total = torch.stack([self._layer(maps, mask) for maps in layers]).sum()
        return total / (len(layers) + 1e-6)

    def _layer(self, maps: Float[Tensor, "b h n m"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, ""]:
        rows = maps.mean(dim=1)
        if mask is None:
            mean, keys = rows.mean(dim=1, keepdim=True), torch.full((), maps.shape[3], device=maps.device)
        else:
            rows = rows.masked_fill(~mask.unsqueeze(-1), 0.0)
            real = mask.sum(dim=1).clamp(min=1)[:, None, None]
            mean = rows.sum(dim=1, keepdim=True) / real
            keys = real if maps.shape[2] == maps.shape[3] else torch.full_like(real, maps.shape[3])
        floor = self.threshold / keys.to(rows.dtype)
        rows, mean = (part.masked_fill(part <= floor, 0.0) for part in (rows, mean))
        cosine = F.cosine_similarity(mean, rows, dim=-1, eps=1e-8)
        return cosine.mean() if mask is None else cosine.sum() / mask.sum().clamp(min=1)
