"""Linear attention as its definition reads: one token after the other."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype


def linear_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    log_decay: Float[Tensor, " h"] | None,
    scale: float,
    initial_state: Float[Tensor, "b h d e"] | None,
    causal: bool,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """What `attnlab.ops.linear_attention` documents, differentiated by autograd through every step."""
    dtype, wide = v.dtype, accumulate_dtype(v.dtype)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    state = initial_state
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    if not causal:
        state = state + torch.einsum("bhmd,bhme->bhde", k, v)
        return (scale * torch.einsum("bhnd,bhde->bhne", q, state)).to(dtype), state
    decay = q.new_ones(q.shape[1]) if log_decay is None else log_decay.exp()
    outputs = []
    for q_i, k_i, v_i in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        state = decay[:, None, None] * state + torch.einsum("bhd,bhe->bhde", k_i, v_i)
        outputs.append(scale * torch.einsum("bhd,bhde->bhe", q_i, state))
    return torch.stack(outputs, 2).to(dtype), state
