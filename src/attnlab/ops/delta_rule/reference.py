"""The delta rule as its definition reads: one token after the other."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype


def delta_rule(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    beta: Float[Tensor, "b h n"],
    *,
    log_decay: Float[Tensor, "b h n"] | None,
    scale: float,
    initial_state: Float[Tensor, "b h d e"] | None,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """What `attnlab.ops.delta_rule` documents, differentiated by autograd through every step."""
    dtype, wide = v.dtype, accumulate_dtype(v.dtype)
    state = initial_state
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=wide)
    outputs = []
    decays = torch.ones_like(beta) if log_decay is None else log_decay.exp()
    for q_i, k_i, v_i, beta_i, decay in zip(*(x.to(wide).unbind(2) for x in (q, k, v, beta, decays)), strict=True):
        state = decay[..., None, None] * state
        error = v_i - torch.einsum("bhd,bhde->bhe", k_i, state)
        state = state + torch.einsum("bhd,bhe->bhde", k_i, beta_i[..., None] * error)
        outputs.append(scale * torch.einsum("bhd,bhde->bhe", q_i, state))
    return torch.stack(outputs, 2).to(dtype), state
