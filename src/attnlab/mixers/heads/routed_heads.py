"""Attention whose head outputs are weighed per token by a router."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.info import Supports
from attnlab.mixers.attention import AttentionMixer
from attnlab.mixers.heads.routers import LinearRouter, QueryNormRouter
from attnlab.mixers.parts.routing import balance_loss


class RoutedHeads(AttentionMixer):
    """Gates on the heads of another `AttentionMixer`: name this base first, and call `add_router` after the constructor.

    ``record`` collects "gates" (b, n, h), "router" (scores of the routed heads, b n r) and "balance_loss" (a scalar to be added
    to the loss), the latter two where there are routed heads.
    """

    linear_router: LinearRouter | None
    norm_router: QueryNormRouter | None
    _promises: Supports | None = None

    @property
    def supports(self) -> Supports:
        """Those of the attention; with all routed heads active there is no choice and so no jump."""
        return self.info.supports if self._promises is None else self._promises

    def add_router(
        self,
        router: str,
        num_shared: int | None,
        num_active: int | None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the router.

        Args:
            router: "linear" or "query_norm".
            num_shared: heads that are always on, the first ones; by default a quarter, with "query_norm" half.
            num_active: routed heads a token uses; by default half of them.
            device: of the router's parameters.
            dtype: of the router's parameters.

        Raises:
            ValueError: for counts that do not fit, or an unknown router.
        """
        if router not in ("linear", "query_norm"):
            raise ValueError(f"router: expected 'linear' or 'query_norm', got {router!r}")
        heads, linear = self.num_heads, router == "linear"
        if num_shared is None:
            num_shared = heads // 4 if linear else heads // 2
        if not 0 <= num_shared <= heads:
            raise ValueError(f"num_shared: expected 0 to num_heads={heads}, got {num_shared}")
        routed = heads - num_shared
        num_active = (routed + 1) // 2 if num_active is None else num_active
        if not min(routed, 1) <= num_active <= routed:
            raise ValueError(f"num_active: expected {min(routed, 1)} to {routed} (num_heads - num_shared), got {num_active}")
        if num_active == routed:
            self._promises = replace(self.supports, discontinuous=False)
        self.linear_router = None
        if linear:
            self.linear_router = LinearRouter(self.dim, heads, num_shared, num_active, device=device, dtype=dtype)
        self.norm_router = None if linear else QueryNormRouter(num_shared, num_active)

    def weigh_heads(
        self, heads: Float[Tensor, "b h n e"], x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b h n e"]:
        """Head outputs times the gates of their tokens."""
        if self.linear_router is not None:
            gates, scores, chosen = self.linear_router(x)
        else:
            q = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2))
            gates, scores, chosen = self.norm_router(q)  # type: ignore[misc]
        self.emit("gates", gates)
        if scores is not None:
            self.emit("router", scores)
            self.emit("balance_loss", lambda: balance_loss(scores, chosen, mask))
        return heads * gates.transpose(1, 2).unsqueeze(-1).to(heads.dtype)


def head_usage(
    gates: Float[Tensor, "b n h"],
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    num_classes: int | None = None,
) -> Float[Tensor, "h"] | Float[Tensor, "k h"]:
    """The share of the real tokens that use each head: those whose gate is not 0.

    Args:
        gates: weights of the heads, as ``record`` collects them under "gates".
        mask: boolean (b, n), True marks a real token.
        labels: integers, a class of each example (b,) or token (b, n), from 0 on; None for all tokens together.
        num_classes: k; by default the largest label and one.

    Returns:
        (h,), or with ``labels`` (k, h), 0 for a class without a real token.

    Raises:
        ValueError: for labels or a mask of another shape, or a label that is no class.
    """
    batch, n, _ = gates.shape
    if mask is not None and mask.shape != (batch, n):
        raise ValueError(f"mask: expected shape {(batch, n)}, got {tuple(mask.shape)}")
    used = (gates != 0).to(gates.dtype).flatten(0, 1)
    real = torch.ones_like(used[:, 0]) if mask is None else mask.flatten().to(used.dtype)
    if labels is None:
        return real @ used / real.sum().clamp(min=1)
    if labels.shape not in ((batch,), (batch, n)):
        raise ValueError(f"labels: expected shape {(batch,)} or {(batch, n)}, got {tuple(labels.shape)}")
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels: expected 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    of_token = labels[:, None].expand(batch, n) if labels.dim() == 1 else labels
    classes = torch.arange(num_classes, device=labels.device)[:, None] == of_token.flatten()
    members = classes.to(used.dtype) * real
    return members @ used / members.sum(dim=1, keepdim=True).clamp(min=1)
