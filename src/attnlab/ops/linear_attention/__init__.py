r"""Linear attention: a state that sums outer products of keys and values, with an optional decay per head.

Causal, for one head with state $S_i \in \mathbb{R}^{d \times e}$ and decay $\lambda = \exp(\texttt{log\_decay}) \le 1$,

$$S_i = \lambda S_{i-1} + k_i v_i^\top, \qquad o_i = s\, S_i^\top q_i ,$$

and not causal $S = S_0 + \sum_j k_j v_j^\top$, $o_i = s\, S^\top q_i$. There is no normaliser and no feature map: a mechanism
applies its own to q and k, and gets a normaliser by a column of ones in v.

The causal form is Lightning Attention-2 (Qin et al. 2024, arXiv 2401.04658): products within a chunk, the state between
chunks. Unlike the paper's kernel it takes and returns states, and differentiates with respect to them and to the decay.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import Op, accumulate_dtype
from attnlab.ops.chunks import common_dtype
from attnlab.ops.linear_attention import eager, reference
from attnlab.ops.triton_launch import UNTRIED, WIDEST, limits

LINEAR_ATTENTION = Op(
    "linear_attention",
    {
        "reference": reference.linear_attention,
        "eager": eager.linear_attention,
        "triton": "attnlab.ops.linear_attention.triton:linear_attention",
    },
    limits={"triton": limits((torch.float32, torch.bfloat16), WIDEST)},
    untried={"triton": UNTRIED},
)

__all__ = ["LINEAR_ATTENTION", "linear_attention"]


def linear_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    log_decay: Float[Tensor, " h"] | None = None,
    scale: float = 1.0,
    initial_state: Float[Tensor, "b h d e"] | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """Output and last state; any split of a sequence that hands the state on gives the output of one pass.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, h, m, d), with m = n if causal.
        v: values (b, h, m, e). Where the dtypes of q, k and v differ, the widest is taken for all.
        log_decay: (h,), the logarithm of each head's decay per token, at most 0 (not checked, for that would wait for a GPU);
            None: no decay. Only if causal.
        scale: factor s of the output.
        initial_state: S_0 (b, h, d, e); None: zeros.
        causal: whether token i reads tokens 0..i or all.
        backend: "auto", "reference" (token by token), "eager" (chunks of 64; gradients once differentiable) or "triton" (on a
            GPU, float32 and bfloat16, keys of width 128 at most; likewise).

    Returns:
        The output (b, h, n, e) in the dtype of the inputs, and the last state (b, h, d, e), in float32 for half precisions.

    Raises:
        TypeError: for tensors that are not floating point.
        ValueError: for shapes that do not fit, an empty sequence, or a decay without causality.
        UnknownNameError: for an unknown backend.
    """
    q, k, v = common_dtype(q=q, k=k, v=v)
    _check_shapes(q, k, v, initial_state)
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"k: expected the {q.shape[2]} tokens of q with causal=True, got {k.shape[2]}; causal=False takes any number"
        )
    if log_decay is not None:
        if not causal:
            raise ValueError("log_decay: expected None with causal=False, got a tensor; a decay needs causal=True")
        if log_decay.shape != q.shape[1:2]:
            raise ValueError(f"log_decay: expected shape ({q.shape[1]},), one number a head, got {tuple(log_decay.shape)}")
    wide = accumulate_dtype(q.dtype)
    return LINEAR_ATTENTION(backend, q)(
        q,
        k,
        v,
        log_decay=None if log_decay is None else log_decay.to(wide),
        scale=float(scale),
        initial_state=None if initial_state is None else initial_state.to(wide),
        causal=causal,
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q, k, v: expected 4 dimensions (b, h, tokens, width), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k, v: expected (b, h, m, d) and (b, h, m, e) for q {tuple(q.shape)}, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[2] == 0 or k.shape[2] == 0:
        raise ValueError("q, k, v: expected at least one token, got none")
    expected = (*q.shape[:2], q.shape[3], v.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"initial_state: expected shape {expected}, got {tuple(state.shape)}")
