r"""Softmax attention over a part of the keys with its log-sum-exp, and the merge of such parts.

$$\mathrm{lse}_i = \log \sum_j \exp(s\, q_i^\top k_j + b_{ij}), \qquad
  o_i = \sum_j \exp(s\, q_i^\top k_j + b_{ij} - \mathrm{lse}_i)\, v_j$$

A part without keys has $o = 0$, $\mathrm{lse} = -\infty$ and is neutral. The merge of parts is associative and commutative, so a
sequence of keys can be split over blocks, workers or devices and give what one softmax over all gives.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.backends import Op
from attnlab.ops.partial_attention import eager, reference
from attnlab.ops.partials import Partial, merge

__all__ = ["Partial", "merge", "partial_attention"]

PARTIAL_ATTENTION = Op("partial_attention", {"reference": reference.partial_attention, "eager": eager.partial_attention})


def partial_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    scale: float | None = None,
    bias: Float[Tensor, "#b #h #n #m"] | None = None,
    allowed: Bool[Tensor, "#b #h #n #m"] | None = None,
    causal: bool = False,
    key_mask: Bool[Tensor, "b m"] | None = None,
    backend: str = "auto",
) -> Partial:
    """Softmax attention over these keys, with what is needed to merge it with attention over others.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, h, m, d); m may be 0.
        v: values (b, h, m, e).
        scale: factor of the products; by default d ** -0.5.
        bias: added to the scaled products, broadcastable to (b, h, n, m).
        allowed: True where a query may use a key, broadcastable likewise.
        causal: key j is allowed for query i if j <= i + m - n. Pairs of the future take no work; as many queries as keys and
            neither ``bias`` nor ``allowed`` are fastest on a CPU.
        key_mask: True marks a key that may be used.
        backend: "auto", "reference" or "eager".

    Raises:
        ValueError: for shapes that do not fit.
    """
    if q.dim() != 4 or k.shape[:3] != v.shape[:3] or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v: expected (b, h, n, d), (b, h, m, d), (b, h, m, e), got {shapes}")
    if key_mask is not None and key_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_mask: expected shape {(k.shape[0], k.shape[2])} to fit k, got {tuple(key_mask.shape)}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    function = PARTIAL_ATTENTION(backend, q)
    return Partial(*function(q, k, v, scale=scale, bias=bias, allowed=allowed, causal=causal, key_mask=key_mask))
