r"""Attention with the exponential to second order, not normalised, in linear time.

$$o_i = \sum_j \Big(1 + s_{ij} + \tfrac12 s_{ij}^2\Big)\, v_j, \qquad s_{ij} = d^{-1/2}\, q_i^\top k_j ,$$

over all j, or over j <= i where causal: linear attention with the features
$\phi(x) = [1,\; x_a d^{-1/4},\; x_a x_b\, c_{ab}\, d^{-1/2}]_{a \le b}$, $c_{aa} = 1/\sqrt2$, $c_{ab} = 1$. These are
D = 1 + d + d (d + 1) / 2 numbers a token, so that they are formed for a piece of the sequence at a time, forward and backward,
and where causal a piece reads its own tokens pair by pair. A denominator is a column of ones in v.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import Op, accumulate_dtype
from attnlab.ops.chunks import common_dtype
from attnlab.ops.taylor_attention import eager, reference
from attnlab.ops.taylor_attention.reference import features

TAYLOR_ATTENTION = Op("taylor_attention", {"reference": reference.taylor_attention, "eager": eager.taylor_attention})

__all__ = ["TAYLOR_ATTENTION", "features", "taylor_attention"]


def taylor_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    initial_state: Float[Tensor, "b h w e"] | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h w e"]]:
    r"""Output and last state $\sum_j \phi(k_j) v_j^\top$; any split that hands the state on gives the output of one pass.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, h, m, d), with m = n if causal.
        v: values (b, h, m, e). Where the dtypes of q, k and v differ, the widest is taken for all.
        initial_state: of the tokens before, (b, h, D, e); None: zeros.
        causal: whether token i reads tokens 0..i or all.
        backend: "auto", "reference" (all features at once) or "eager" (in pieces; gradients once differentiable).

    Returns:
        The output (b, h, n, e) in the dtype of the inputs, and the last state (b, h, D, e), in float32 for half precisions.

    Raises:
        TypeError: for tensors that are not floating point.
        ValueError: for shapes that do not fit, or an empty sequence.
        UnknownNameError: for an unknown backend.
    """
    q, k, v = common_dtype(q=q, k=k, v=v)
    fit = q.dim() == k.dim() == v.dim() == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]
    if not fit or v.shape[:3] != k.shape[:3] or q.shape[2] == 0 or k.shape[2] == 0:
        got = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"q, k, v: expected (b, h, n, d), (b, h, m, d) and (b, h, m, e) with n, m >= 1, got {got}")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"k: expected the {q.shape[2]} tokens of q with causal=True, got {k.shape[2]}")
    d = q.shape[3]
    expected = (*q.shape[:2], 1 + d + d * (d + 1) // 2, v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state: expected shape {expected}, got {tuple(initial_state.shape)}")
    wide = accumulate_dtype(q.dtype)
    state = None if initial_state is None else initial_state.to(wide)
    o, state = TAYLOR_ATTENTION(backend, q)(q.to(wide), k.to(wide), v.to(wide), state, causal)
    return o.to(v.dtype), state
