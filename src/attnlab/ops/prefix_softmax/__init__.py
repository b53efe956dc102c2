r"""Softmax over every prefix of a sequence, for scores that are the keys' own: attention as a recurrent network.

With a score $s_j$ a key, the same for all queries,

$$o_t = \frac{\sum_{j \le t} e^{s_j} v_j}{\sum_{j \le t} e^{s_j}},$$

is a recurrence whose state is the mean $o_t$ and the logarithm of its denominator, $\ell_t = \log \sum_{j \le t} e^{s_j}$. Sets
of keys make a monoid under the merge of `attnlab.ops.partial_attention`, so that a stream goes on from its state, pieces can be
summed up apart, and all prefixes come of a parallel scan (Feng et al. 2024, arXiv 2405.13956, sections 3.1 and 3.2).
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.backends import Op, accumulate_dtype
from attnlab.ops.prefix_softmax import eager, reference

PREFIX_SOFTMAX = Op("prefix_softmax", {"reference": reference.prefix_softmax, "eager": eager.prefix_softmax})

__all__ = ["PREFIX_SOFTMAX", "prefix_softmax"]


def prefix_softmax(
    scores: Float[Tensor, "b h n"],
    v: Float[Tensor, "b h n e"],
    *,
    mask: Bool[Tensor, "#b n"] | None = None,
    mean: Float[Tensor, "b h e"] | None = None,
    lse: Float[Tensor, "b h"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """The mean up to each token and the logarithm of its weights' sum; the last of both are the state.

    Args:
        scores: s (b, h, n).
        v: values (b, h, n, e).
        mask: True marks a token that counts, (b or 1, n); None: all.
        mean: of the tokens before, (b, h, e); None: there are none.
        lse: the logarithm of their weights' sum, (b, h), -inf where there are none; with ``mean``.
        backend: "auto", "reference" (token by token) or "eager" (chunks).

    Returns:
        The means (b, h, n, e), 0 as long as no token counted, in the dtype of v, and the logarithms (b, h, n), -inf as long, in
        float32 or wider.

    Raises:
        ValueError: for shapes that do not fit, an empty sequence, or one of ``mean`` and ``lse`` without the other.
        UnknownNameError: for an unknown backend.
    """
    if scores.dim() != 3 or v.dim() != 4 or v.shape[:3] != scores.shape or scores.shape[2] == 0:
        got = f"{tuple(scores.shape)} and {tuple(v.shape)}"
        raise ValueError(f"scores, v: expected (b, h, n) and (b, h, n, e) with n >= 1, got {got}")
    if (mean is None) != (lse is None):
        raise ValueError("mean, lse: expected both or neither, got one of them")
    b, h, n, e = v.shape
    for name, tensor, shapes in (
        ("mask", mask, ((b, n), (1, n))),
        ("mean", mean, ((b, h, e),)),
        ("lse", lse, ((b, h),)),
    ):
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name}: expected shape {shapes[0]}, got {tuple(tensor.shape)}")
    wide = accumulate_dtype(v.dtype)
    scores = scores.to(wide)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    if mean is None or lse is None:
        mean, lse = v.new_zeros(b, h, e, dtype=wide), v.new_full((b, h), float("-inf"), dtype=wide)
    means, lses = PREFIX_SOFTMAX(backend, v)(scores, v.to(wide), mean.to(wide), lse.to(wide))
    return means.to(v.dtype), lses
