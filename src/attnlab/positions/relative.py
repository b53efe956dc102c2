"""Relative position: logits from the query and a learned vector a distance, by gather or by skew."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.positions.base import Position, positions


def relative_by_gather(q: Float[Tensor, "b h n d"], table: Float[Tensor, "h r d"], num_keys: int) -> Float[Tensor, "b h n m"]:
    """Logits of all query-distance pairs, then each (i, j) picks the one of its distance: O(n r) memory besides the result."""
    half = (table.shape[1] - 1) // 2
    rows = torch.arange(q.shape[2], device=q.device).unsqueeze(1) + (num_keys - q.shape[2])
    distance = (torch.arange(num_keys, device=q.device) - rows).clamp(-half, half) + half
    by_distance = torch.einsum("bhnd,hrd->bhnr", q, table)
    return by_distance.gather(-1, distance.expand(*q.shape[:2], -1, -1))


def relative_by_skew(q: Float[Tensor, "b h n d"], table: Float[Tensor, "h r d"], num_keys: int) -> Float[Tensor, "b h n m"]:
    """The same by shifting rows: a row padded by one, read with a stride one shorter, moves one step further at each query.

    Needs no index of size n x m and no gather; Huang et al. 2018 (Music Transformer), section 3.4, here for both directions.
    """
    n, half = q.shape[2], (table.shape[1] - 1) // 2
    # Column c holds the distance c - (n - 1) - (num_keys - n) of query 0 .. so that row i starts n - 1 - i columns further in.
    distance = torch.arange(n + num_keys - 1, device=q.device) - (num_keys - 1)
    rows = torch.einsum("bhnd,hrd->bhnr", q, table[:, distance.clamp(-half, half) + half])
    width = n + num_keys - 1
    flat = F.pad(rows, (0, 1)).flatten(-2)  # rows of width + 1
    flat = flat[..., n - 1 : n - 1 + n * width]
    return flat.unflatten(-1, (n, width))[..., :num_keys]


@positions.register("relative", family="bias", paper="music-transformer")
class RelativePosition(Position):
    r"""Learned relative position in the logits (Shaw et al. 2018, equation 5; Huang et al. 2018, section 3.4).

    $$b_{ij} = s\, q_i^\top e_{\mathrm{clip}(j - i)}, \qquad e \in \mathbb{R}^{h \times (2r+1) \times d}$$

    Args:
        num_heads: heads, each with its own table.
        head_dim: width of a query.
        max_distance: r; distances beyond it share the last vector.
        method: "skew" (no n x m index) or "gather"; both give the same numbers.

    Raises:
        ValueError: for an unknown method or a distance below 1.
    """

    def __init__(self, num_heads: int, head_dim: int, *, max_distance: int = 128, method: str = "skew") -> None:
        super().__init__(num_heads, head_dim)
        if method not in ("skew", "gather"):
            raise ValueError(f"method: expected 'skew' or 'gather', got {method!r}")
        if max_distance < 1:
            raise ValueError(f"max_distance: expected at least 1, got {max_distance}")
        self.method = method
        self.table = nn.Parameter(torch.randn(num_heads, 2 * max_distance + 1, head_dim) * head_dim**-0.5)

    def bias(
        self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None
    ) -> Float[Tensor, "#b h n m"] | None:
        """The logits of the distances (b, h, n, m), scaled like the content's."""
        run = relative_by_skew if self.method == "skew" else relative_by_gather
        return run(q * self.head_dim**-0.5, self.table.to(q.dtype), num_keys)
