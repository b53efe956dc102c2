"""Routers over heads: which heads a token uses, with which weight."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.mixers.parts.routing import top_k_mask


class LinearRouter(nn.Module):
    r"""Two-stage linear router of MoH (Jin et al. 2024, equations 4 to 6): shared heads always on, k of the routed ones by score.

    With scores $p = \mathrm{softmax}(W_g x)$, the top-k set S, and a balance $a = 2\,\mathrm{softmax}(W_0 x)$:
    shared head i gets $a_0 H_s\,\mathrm{softmax}(W_1 x)_i$, routed head i gets $a_1 k\,p_i / \sum_S p$ in S and 0 elsewhere.

    Args:
        dim: width of the tokens.
        num_heads: all heads, shared ones first.
        num_shared: heads that are always on.
        num_active: k, routed heads that a token uses; 0 when all heads are shared.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_shared: int,
        num_active: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_shared, self.num_active = num_shared, num_active

        def linear(width: int) -> nn.Linear:
            return nn.Linear(dim, width, bias=False, device=device, dtype=dtype)

        self.routed = linear(num_heads - num_shared) if num_active else None
        self.shared = linear(num_shared) if num_shared > 1 else None
        self.balance = linear(2) if num_shared and num_active else None

    def forward(
        self, x: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b n h"], Float[Tensor, "b n r"] | None, Bool[Tensor, "b n r"] | None]:
        """Weights of all heads, shared ones first; scores and choice of the routed ones."""
        parts = []
        balance = None if self.balance is None else 2.0 * self.balance(x).softmax(dim=-1)
        if self.num_shared:
            if self.shared is None:
                shared = torch.ones_like(x[..., :1])
            else:
                shared = self.shared(x).softmax(dim=-1)
            shared = shared * self.num_shared
            parts.append(shared if balance is None else shared * balance[..., :1])
        if self.routed is None:
            return torch.cat(parts, dim=-1), None, None
        scores = self.routed(x).softmax(dim=-1)
        chosen = top_k_mask(scores, self.num_active)
        kept = scores.masked_fill(~chosen, 0.0)
        # top-k scores of a softmax sum to at least k / E, so the clamp only guards half precision
        routed = self.num_active * kept / kept.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).eps)
        parts.append(routed if balance is None else routed * balance[..., 1:])
        return torch.cat(parts, dim=-1), scores, chosen


class QueryNormRouter(nn.Module):
    r"""Parameter-free router of MoH's continue-tuned language models: heads with long queries are on, weights are binary.

    Scores are $\mathrm{softmax}_i(\lVert q_i \rVert_2 / \mathrm{std}_i \lVert q_i \rVert_2)$ over the routed heads, queries
    before their position. In the forward pass the weight is 1 for shared and chosen heads, else 0; the gradient is that of the
    score (straight through).

    Args:
        num_shared: heads that are always on.
        num_active: routed heads that a token uses; 0 when all heads are shared.
    """

    def __init__(self, num_shared: int, num_active: int) -> None:
        super().__init__()
        self.num_shared, self.num_active = num_shared, num_active

    def forward(
        self, q: Float[Tensor, "b h n d"]
    ) -> tuple[Float[Tensor, "b n h"], Float[Tensor, "b n r"] | None, Bool[Tensor, "b n r"] | None]:
        """Weights of all heads, shared ones first; scores and choice of the routed ones."""
        if not self.num_active:
            return torch.ones_like(q[..., 0]).transpose(1, 2), None, None
        squares = q[:, self.num_shared :].square().sum(dim=-1).transpose(1, 2)
        tiny = torch.finfo(q.dtype).tiny  # keeps both roots differentiable at a masked token, whose queries are zero
        lengths = (squares + tiny).sqrt()
        spread = (lengths.var(dim=-1, keepdim=True) + tiny).sqrt() if lengths.shape[-1] > 1 else torch.ones_like(lengths)
        scores = (lengths / spread).softmax(dim=-1)
        chosen = top_k_mask(scores, self.num_active)
        # What is added is exactly 0: a chosen head is what it is without the router.
        binary = chosen.to(scores.dtype) + (scores - scores.detach())
        shared = binary.new_ones(*binary.shape[:2], self.num_shared)
        return torch.cat((shared, binary), dim=-1), scores, chosen
