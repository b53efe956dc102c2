"""Flow attention as its definition reads: one token after the other."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def flow_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    number: Float[Tensor, "b n"],
    mask: Bool[Tensor, "b n"] | None,
    first: tuple[Tensor, ...],
    eps: float,
) -> tuple[Float[Tensor, "b h n e"], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What `attnlab.ops.flow_attention` documents; features are 0 at masked tokens, ``number`` is at least 1."""
    products, sources, keys, sinks, queries, competition = first
    outputs, flows = [], []

    def meet(a: Float[Tensor, "b h d"], total: Float[Tensor, "b h d"]) -> Float[Tensor, "b h"]:
        return ((a + eps) * (total + eps)).sum(-1)

    for t in range(q.shape[2]):
        q_t, k_t, v_t, f = q[:, :, t], k[:, :, t], v[:, :, t], number[:, t, None]
        keys, queries = keys + k_t, queries + q_t
        inflow, outflow = meet(q_t, keys) / f, meet(k_t, queries) / f
        sources, sinks = sources + k_t / outflow.unsqueeze(-1), sinks + q_t / inflow.unsqueeze(-1)
        allocation = torch.sigmoid(meet(q_t, sources) / f)
        strength = (meet(k_t, sinks) / f).clamp(-1.0, 1.0).exp()
        strength = strength if mask is None else strength * mask[:, t, None]
        competition = competition + strength
        rivalry = strength / competition.masked_fill(competition == 0, 1.0) * f
        products = products + torch.einsum("bhd,bhe->bhde", k_t, v_t * rivalry.unsqueeze(-1))
        outputs.append(torch.einsum("bhd,bhde->bhe", q_t, products) * (allocation / (inflow * f)).unsqueeze(-1))
        flows.append((inflow, allocation, rivalry))
    found = tuple(torch.stack(x, 2) for x in zip(*flows, strict=True))
    return torch.stack(outputs, 2), found, (products, sources, keys, sinks, queries, competition)
