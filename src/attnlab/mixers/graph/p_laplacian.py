"""One step of p-Laplacian message passing on a weighted graph."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype

FLOOR = 1e-8
"""What the authors add to the adjacency under its root, and to each element of a difference: it bounds weights for p < 2."""


def p_laplacian(
    adjacency: Float[Tensor, "b h n m"],
    features: Float[Tensor, "b h m d"],
    p: float | Float[Tensor, ""],
    mu: float | Float[Tensor, ""],
    *,
    queries: Float[Tensor, "b h n d"] | None = None,
) -> Float[Tensor, "b h n d"]:
    r"""The features after one step (Wu et al. 2023).

    $$w_{ij} = A_{ij}\, \lVert \sqrt{A_{ij}}\,(F_j - F_i) \rVert_2^{\,p-2}, \quad
      \alpha_i = \Big(\sum_j w_{ij} + \frac{2\mu}{p}\Big)^{-1}, \quad
      F'_i = \alpha_i \sum_j w_{ij} F_j + \alpha_i \frac{2\mu}{p} F_i$$

    p = 2 weighs by A as it is; less prefers neighbours that are alike, more those that differ. By definition a difference is
    formed for each pair: time and memory O(n m d).

    With ``queries`` the graph is bipartite: they are nodes of their own that receive from the ``features`` and keep nothing of
    themselves, as in the authors' code, where the last term is lost.

    Args:
        adjacency: A, not negative, 0 between what is not connected; it need not be symmetric.
        features: F of the nodes that send.
        p: at least 1.
        mu: how much a node keeps of itself; positive.
        queries: features of the nodes that receive; None if they are the same nodes, n = m.

    A node without neighbours keeps its features, or gets 0 in a bipartite graph. In half precision it computes in float32. For
    p < 2 a node's weight to itself is that of the floor $10^{-8}$ on a difference of zero, which dwarfs all others.
    """
    wide = accumulate_dtype(features.dtype)
    weights, own = adjacency.to(wide), features.to(wide)
    receivers = own if queries is None else queries.to(wide)
    difference = own.unsqueeze(2) - receivers.unsqueeze(3)
    if queries is None:
        # A node's difference to itself is 0 whatever it is; left to autograd, two gradients of size 1e8 would have to cancel.
        itself = torch.eye(own.shape[2], device=own.device, dtype=torch.bool).unsqueeze(-1)
        difference = difference.masked_fill(itself, 0.0)
    gradient = ((weights + FLOOR).sqrt().unsqueeze(-1) * difference + FLOOR).norm(dim=-1)
    weights = weights * gradient ** (p - 2.0)
    keep = 2.0 * mu / p
    total = weights @ own
    if queries is None:
        total = total + keep * own
    return (total / (weights.sum(dim=-1, keepdim=True) + keep)).to(features.dtype)
