r"""The delta rule: linear attention whose write corrects what the state would have read at the key.

For one head with state $S_t \in \mathbb{R}^{d \times e}$ and write strength $\beta_t$,

$$S_t = S_{t-1} + \beta_t\, k_t (v_t - S_{t-1}^\top k_t)^\top = (I - \beta_t k_t k_t^\top) S_{t-1} + \beta_t k_t v_t^\top, \qquad
o_t = s\, S_t^\top q_t .$$

With $\beta_t \|k_t\|^2 \le 2$ no step enlarges the state; keys are usually normalised to length 1 and $\beta_t \in (0, 1)$.
A step with $\beta_t = 0$ leaves the state as it is, which is how padding is skipped. A gate multiplies $S_{t-1}$ by
$e^{g_t}$ first, both where it is kept and where it is read.

Yang et al. 2024 (arXiv 2406.06484); evaluated by chunks in the WY form of that paper, in which a triangular system takes
the place of the products of $I - \beta_t k_t k_t^\top$.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import Op, accumulate_dtype
from attnlab.ops.chunks import common_dtype
from attnlab.ops.delta_rule import eager, reference

DELTA_RULE = Op("delta_rule", {"reference": reference.delta_rule, "eager": eager.delta_rule})

__all__ = ["DELTA_RULE", "delta_rule"]


def delta_rule(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    beta: Float[Tensor, "b h n"],
    *,
    log_decay: Float[Tensor, "b h n"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "b h d e"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """Output and last state; any split of a sequence that hands the state on gives the output of one pass.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, h, n, d).
        v: values (b, h, n, e). Where the dtypes of q, k, v and beta differ, the widest is taken for all.
        beta: write strengths (b, h, n).
        log_decay: logarithm of a gate that multiplies the state before each step, (b, h, n), at most 0 (not checked, for that
            would wait for a GPU); None: no gate. With it this is the gated delta rule (Yang et al. 2024, arXiv 2412.06464).
        scale: factor s of the output; None: d ** -0.5.
        initial_state: S_0 (b, h, d, e); None: zeros.
        backend: "auto", "reference" (token by token) or "eager" (chunks of 32; gradients once differentiable).

    Returns:
        The output (b, h, n, e) in the dtype of the inputs, and the last state (b, h, d, e), in float32 for half precisions.

    Raises:
        TypeError: for tensors that are not floating point.
        ValueError: for shapes that do not fit, or an empty sequence.
        UnknownNameError: for an unknown backend.
    """
    q, k, v, beta = common_dtype(q=q, k=k, v=v, beta=beta)
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q, k, v: expected (b, h, n, d) twice and (b, h, n, e), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    for name, number in (("beta", beta), ("log_decay", log_decay)):
        if number is not None and number.shape != q.shape[:3]:
            raise ValueError(
                f"{name}: expected shape {tuple(q.shape[:3])}, one number a token and head, got {tuple(number.shape)}"
            )
    if q.shape[2] == 0:
        raise ValueError("q, k, v: expected at least one token, got none")
    expected = (*q.shape[:2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state: expected shape {expected}, got {tuple(initial_state.shape)}")
    return DELTA_RULE(backend, q)(
        q,
        k,
        v,
        beta,
        log_decay=None if log_decay is None else log_decay.to(q.dtype),
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        initial_state=None if initial_state is None else initial_state.to(accumulate_dtype(q.dtype)),
    )
