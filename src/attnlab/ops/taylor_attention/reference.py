"""Second-order attention as its definition reads: all weights, and all features for the state."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def features(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n w"]:
    """One, the channels, and their products, each once."""
    d = x.shape[-1]
    a, b = torch.triu_indices(d, d, device=x.device).unbind()
    factor = (1.0 - (1.0 - 0.5**0.5) * (a == b).to(x.dtype)) * d**-0.5
    return torch.cat((torch.ones_like(x[..., :1]), x * d**-0.25, x[..., a] * x[..., b] * factor), dim=-1)


def taylor_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    state: Float[Tensor, "b h w e"] | None,
    causal: bool,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h w e"]]:
    """What `attnlab.ops.taylor_attention` documents; time and memory quadratic in n."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = 1.0 + scores + 0.5 * scores.square()
    o = (weights.tril() if causal else weights) @ v
    after = features(k).mT @ v
    return (o, after) if state is None else (o + features(q) @ state, after + state)
