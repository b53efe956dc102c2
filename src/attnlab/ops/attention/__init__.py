r"""Dense attention with slots: independent sources, grouped keys and values, scale, bias, three masks, normaliser.

For query $q_i$, keys $k_j$ and values $v_j$ of one head,

$$o_i = \sum_j c_{ij} w_{ij} v_j, \qquad w_i = \mathrm{normalizer}_j(s\, q_i^\top k_j + b_{ij}) ,$$

over the pairs that all masks allow. Pairs that are not allowed have weight 0, a query without any key gives exactly 0.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.attention import eager, reference
from attnlab.ops.attention.normalizers import NORMALIZERS, ClippedSoftmax, Normalizer, TopKSoftmax, create_normalizer
from attnlab.ops.attention.pairwise import Pairwise, check_pairwise
from attnlab.ops.backends import Op

ATTENTION = Op("attention", {"reference": reference.attention, "eager": eager.attention})

__all__ = ["ATTENTION", "NORMALIZERS", "ClippedSoftmax", "Normalizer", "Pairwise", "TopKSoftmax", "attention", "attention_map"]


def attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    *,
    scale: float | None = None,
    bias: Float[Tensor, "#b #h #n #m"] | Pairwise | None = None,
    factor: Float[Tensor, "#b #h #n #m"] | Pairwise | None = None,
    causal: bool = False,
    key_mask: Bool[Tensor, "b m"] | None = None,
    pair_mask: Bool[Tensor, "#b #h n m"] | None = None,
    normalizer: str | Normalizer = "softmax",
    backend: str = "auto",
) -> Float[Tensor, "b h n e"]:
    """Attention of every query over the keys it may use.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, hk, m, d); ``hk`` divides ``h`` and query head ``i`` reads key head ``i // (h / hk)``, nothing is repeated.
        v: values (b, hk, m, e).
        scale: factor of the products; by default d ** -0.5.
        bias: $b$, added to the scaled products: broadcastable to (b, h, n, m), or stored by offset (`Pairwise`).
        factor: $c$, multiplies the weights after the normaliser, likewise; rows are not normalised again.
        causal: key j is allowed for query i if j <= i + m - n, so that the last query sees every key.
        key_mask: (b, m), True marks a key that may be used.
        pair_mask: (b or 1, h or 1, n, m), True: this query may use this key.
        normalizer: a name out of `NORMALIZERS` or a `Normalizer` with its constants. Over rows: "softmax", "softmax_plus_one",
            "clipped_softmax", "top_k_softmax"; element by element: "sigmoid", "tanh", "relu", "taylor_exp",
            "identity".
        backend: "auto", "reference" (the formula) or "eager": SDPA where it has the slots, blocks of queries otherwise, with no
            n x m tensor in either direction.

    Raises:
        ValueError: for shapes that do not fit.
        UnknownNameError: for an unknown normaliser or backend.
    """
    if v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k, v: expected shapes (b, hk, m, d) and (b, hk, m, e), got {tuple(k.shape)} and {tuple(v.shape)}")
    slots = _slots(q, k, scale, bias, factor, normalizer)
    return ATTENTION(backend, q)(q, k, v, causal=causal, key_mask=key_mask, pair_mask=pair_mask, **slots)


def attention_map(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    *,
    scale: float | None = None,
    bias: Float[Tensor, "#b #h #n #m"] | Pairwise | None = None,
    factor: Float[Tensor, "#b #h #n #m"] | Pairwise | None = None,
    causal: bool = False,
    key_mask: Bool[Tensor, "b m"] | None = None,
    pair_mask: Bool[Tensor, "#b #h n m"] | None = None,
    normalizer: str | Normalizer = "softmax",
) -> Float[Tensor, "b h n m"]:
    """What `attention` multiplies the values by, $c_{ij} w_{ij}$, formed: for mechanisms that compute with the map itself.

    Arguments and errors are those of `attention`. Memory O(n m) a head.
    """
    slots = _slots(q, k, scale, bias, factor, normalizer)
    return reference.attention_map(q, k, causal=causal, key_mask=key_mask, pair_mask=pair_mask, **slots)


def _slots(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    bias: Tensor | Pairwise | None,
    factor: Tensor | Pairwise | None,
    normalizer: str | Normalizer,
) -> dict[str, Any]:
    """The slots as the implementations take them, checked."""
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q, k: expected 4 dimensions (b, heads, tokens, width), got {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected shape (b, hk, m, d) for q {tuple(q.shape)}, got {tuple(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides the {q.shape[1]} of q, got {k.shape[1]}")
    bias, factor = Pairwise.of(bias), Pairwise.of(factor)
    shape = (*q.shape[:3], k.shape[2])
    check_pairwise("bias", bias, shape, q.shape[3])
    check_pairwise("factor", factor, shape, None)
    return {
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "bias": bias,
        "factor": factor,
        "normalizer": create_normalizer(normalizer) if isinstance(normalizer, str) else normalizer,
    }
