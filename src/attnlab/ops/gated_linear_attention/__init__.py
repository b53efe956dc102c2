r"""Linear attention whose decay depends on the token, one a head or one a channel of the keys.

For one head with state $S_i \in \mathbb{R}^{d \times e}$ and decays $a_i = \exp(\texttt{log\_decay}_i) \in [0, 1]$, a number or a
vector over the d channels,

$$S_i = \mathrm{diag}(a_i)\, S_{i-1} + k_i v_i^\top, \qquad o_i = s\, S_i^\top q_i .$$

One decay a head is the state-space dual of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), one a channel gated linear attention
(Yang et al. 2023, arXiv 2312.06635). Where the decay is the same for all tokens, `attnlab.ops.linear_attention` is faster.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import Op, accumulate_dtype
from attnlab.ops.chunks import common_dtype
from attnlab.ops.gated_linear_attention import eager, reference

GATED_LINEAR_ATTENTION = Op(
    "gated_linear_attention", {"reference": reference.gated_linear_attention, "eager": eager.gated_linear_attention}
)

__all__ = ["GATED_LINEAR_ATTENTION", "gated_linear_attention"]


def gated_linear_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    log_decay: Float[Tensor, "b h n w"],
    *,
    scale: float = 1.0,
    initial_state: Float[Tensor, "b h d e"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """Output and last state; any split of a sequence that hands the state on gives the output of one pass.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, h, n, d).
        v: values (b, h, n, e). Where the dtypes of the inputs differ, the widest is taken for all.
        log_decay: logarithm of what token i leaves of each channel of the state before it, (b, h, n, d), or (b, h, n, 1) for all
            channels alike; at most 0 (not checked, for that would wait for a GPU). -inf forgets everything.
        scale: factor s of the output.
        initial_state: S_0 (b, h, d, e); None: zeros.
        backend: "auto", "reference" (token by token) or "eager" (chunks; gradients once differentiable).

    Returns:
        The output (b, h, n, e) in the dtype of the inputs, and the last state (b, h, d, e), in float32 for half precisions.

    Raises:
        TypeError: for tensors that are not floating point.
        ValueError: for shapes that do not fit, or an empty sequence.
        UnknownNameError: for an unknown backend.
    """
    q, k, v, log_decay = common_dtype(q=q, k=k, v=v, log_decay=log_decay)
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3] or q.shape[2] == 0:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v: expected (b, h, n, d), (b, h, n, d), (b, h, n, e) with n >= 1, got {shapes}")
    if log_decay.shape not in ((*q.shape[:3], 1), q.shape):
        raise ValueError(f"log_decay: expected {(*q.shape[:3], 1)} or {tuple(q.shape)}, got {tuple(log_decay.shape)}")
    expected = (*q.shape[:2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state: expected shape {expected}, got {tuple(initial_state.shape)}")
    state = None if initial_state is None else initial_state.to(accumulate_dtype(q.dtype))
    return GATED_LINEAR_ATTENTION(backend, q)(q, k, v, log_decay, scale=float(scale), initial_state=state)
