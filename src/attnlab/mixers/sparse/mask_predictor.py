"""A low-rank, sparse estimate of an attention map from reduced queries and keys."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class MaskPredictor(nn.Module):
    r"""Scores of all pairs out of few coefficients and a basis of the tokens (Wei et al. 2023, Sparsifiner, section 3.2).

    $$k' = (W_k k)^\top P_{down}, \qquad C = \mathrm{softmax}(h^{-1/2}\, W_q(q)\, k'), \qquad
      S = [C]_{> \tau_c}\; [\,|P_{up}|^\top\,]_{> \tau_b}$$

    with $P \in \mathbb{R}^{N \times K}$ and coefficients over K entries of the basis; h is the number of heads (so it is
    published). What is not above its threshold is 0. For the loss of the reconstruction there are no thresholds and no absolute
    value. The heads share all parameters.

    Args:
        num_tokens: N.
        num_heads: h.
        head_dim: width of a query.
        reduced_tokens: K.
        reduced_dim: rows of $W_q$ and $W_k$, which have biases.
        coef_threshold: $\tau_c$.
        coef_top_k: keep so many coefficients of a query, the largest, in place of the threshold.
        basis_threshold: $\tau_b$.
        shared_basis: one P, down and up.
    """

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        head_dim: int,
        *,
        reduced_tokens: int,
        reduced_dim: int,
        coef_threshold: float,
        coef_top_k: int | None,
        basis_threshold: float,
        shared_basis: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = num_heads**-0.5
        self.coef_threshold, self.coef_top_k, self.basis_threshold = coef_threshold, coef_top_k, basis_threshold
        self.q_proj = nn.Linear(head_dim, reduced_dim, device=device, dtype=dtype)
        self.k_proj = nn.Linear(head_dim, reduced_dim, device=device, dtype=dtype)
        self.down = nn.Parameter(torch.empty(num_tokens, reduced_tokens, device=device, dtype=dtype))
        self.up = self.down if shared_basis else nn.Parameter(torch.empty_like(self.down))
        for basis in (self.down, self.up):
            nn.init.trunc_normal_(basis, std=0.02)

    def coefficients(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b h n r"]:
        """C, of all queries; masked keys have no part in it."""
        reduced = self.k_proj(k)
        if mask is not None:
            reduced = reduced.masked_fill(~mask[:, None, :, None], 0.0)
        reduced = (reduced.mT @ self.down).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return (self.scale * self.q_proj(q) @ reduced).softmax(dim=-1)

    def pruned(self, coefficients: Float[Tensor, "b h n r"]) -> Float[Tensor, "b h n r"]:
        """What is kept of C."""
        if self.coef_top_k is None:
            return coefficients * (coefficients > self.coef_threshold)
        best = coefficients.topk(min(self.coef_top_k, coefficients.shape[-1]), dim=-1)
        return torch.zeros_like(coefficients).scatter(-1, best.indices, best.values)

    def scores(self, coefficients: Float[Tensor, "b h n r"]) -> Float[Tensor, "b h n n"]:
        """S of coefficients that are pruned already."""
        basis = self.up.abs()
        return coefficients @ (basis * (basis > self.basis_threshold)).mT

    def reconstruction(self, coefficients: Float[Tensor, "b h n r"]) -> Float[Tensor, "b h n n"]:
        """The estimate that is trained: all of C, and the basis with its signs."""
        return coefficients @ self.up.mT
