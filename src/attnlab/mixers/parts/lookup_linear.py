"""A linear layer's place taken by tables: signs of a chunk of the input address a row, and the rows are summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.ops.backends import accumulate_dtype

WEIGHTS = ("l1_prob", "prob")


def lookup_addresses(
    x: Float[Tensor, "*s c"], tau: int, weight: str = "l1_prob"
) -> tuple[Int[Tensor, "*s k"], Float[Tensor, "*s k"]]:
    r"""Row and weight of each chunk $z_k$ of ``tau`` channels, which layers that read the same input can share.

    $$a_k = \sum_j [z_{kj} \ge 0]\, 2^{\tau - 1 - j}, \qquad p_k = \prod_j \sigma(2 |z_{kj}|), \qquad
      w_k = \lVert z_k \rVert_1\, p_k \;\text{ or }\; p_k$$

    $p_k$ is the share of $z_k$'s nearest corner in a softmax of $\langle z_k, s \rangle$ over the corners $s \in \{-1, 1\}^\tau$.
    The gradient flows through the weight alone; at exactly 0, whose sign counts as +1, it is 0.

    Args:
        x: its last dimension is a multiple of ``tau``.
        tau: width of a chunk.
        weight: "l1_prob" ($\lVert z_k \rVert_1 p_k$) or "prob" ($p_k$).
    """
    chunks = x.unflatten(-1, (-1, tau))
    places = 2 ** torch.arange(tau - 1, -1, -1, device=x.device)
    size = chunks.abs().to(accumulate_dtype(x.dtype))
    share = F.logsigmoid(2.0 * size).sum(dim=-1).exp()
    return ((chunks >= 0) * places).sum(dim=-1), (share * size.sum(dim=-1) if weight == "l1_prob" else share).to(x.dtype)


class LookupLinear(nn.Module):
    r"""A Memory Layer (Ding et al. 2024, MemoryFormer; equations as the authors' code has them).

    The input is cut into K = d / tau chunks; with the rows $a_k$ and weights $w_k$ of `lookup_addresses` and tables
    $T_k \in \mathbb{R}^{2^\tau \times e}$,

    $$y = \sum_{k=1}^{K} w_k\, T_k[a_k] + b$$

    Time O(K e) a token, against O(d e) of a linear layer; memory for the parameters is $2^\tau / \tau$ times as large.

    Args:
        in_features: d, a multiple of ``tau``.
        out_features: e.
        tau: width of a chunk, 1 to 16.
        weight: "l1_prob" (the authors' code) or "prob" (the paper).
        bias: whether b is there.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for widths that do not fit, or an unknown weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tau: int = 8,
        weight: str = "l1_prob",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if weight not in WEIGHTS:
            raise ValueError(f"weight: expected one of {WEIGHTS}, got {weight!r}")
        if not 1 <= tau <= 16:
            raise ValueError(f"tau: expected 1 to 16, got {tau}")
        if in_features < 1 or in_features % tau:
            raise ValueError(f"tau: expected a divisor of the {in_features} channels that it cuts into chunks, got {tau}")
        self.in_features, self.out_features, self.tau, self.weight = in_features, out_features, tau, weight
        shape = (in_features // tau, 2**tau, out_features)
        self.tables = nn.Parameter(0.02 * torch.randn(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(0.001 * torch.randn(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Float[Tensor, "*s c"]) -> Float[Tensor, "*s e"]:
        """Address the tables by ``x`` and read them."""
        return self.read(*lookup_addresses(x, self.tau, self.weight))

    def read(self, rows: Int[Tensor, "*s k"], weights: Float[Tensor, "*s k"]) -> Float[Tensor, "*s e"]:
        """The weighted sum of one row of each table, for addresses that another layer may have computed."""
        chunks = self.tables.shape[0]
        first = torch.arange(chunks, device=rows.device) * self.tables.shape[1]
        # One fused sum: the rows of a token are never laid side by side, forward or backward.
        y = F.embedding_bag(
            (rows + first).reshape(-1, chunks),
            self.tables.flatten(0, 1),
            mode="sum",
            per_sample_weights=weights.reshape(-1, chunks).to(self.tables.dtype),
        )
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, rows.shape[:-1])
