r"""Softmax attention over a part of the keys with its log-sum-exp, and the merge of such parts.

$$\mathrm{lse}_i = \log \sum_j \exp(s\, q_i^\top k_j + b_{ij}), \qquad
  o_i = \sum_j \exp(s\, q_i^\top k_j + b_{ij} - \mathrm{lse}_i)\, v_j$$

A part without keys has $o = 0$, $\mathrm{lse} = -\infty$ and is neutral. The merge of parts is associative and commutative, so a
sequence of keys can be split over blocks, workers or devices and give what one softmax over all gives.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from attnlab.ops.backends import Op
from attnlab.ops.partial_attention import eager, reference
from attnlab.ops.partials import Partial, merge

__all__ = ["Partial", "merge", "partial_attention"]

PARTIAL_ATTENTION = Op("partial_attention", {"reference": reference.partial_attention, "eager": eager.partial_attention})


def partial_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    *,
    scale: float | None = None,
    bias: Float[Tensor, "#b #h #n #m"] | None = None,
    allowed: Bool[Tensor, "#b #h #n #m"] | None = None,
    causal: bool = False,
    key_mask: Bool[Tensor, "b m"] | None = None,
    backend: str = "auto",
) -> Partial:
    """Softmax attention over these keys, with what is needed to merge it with attention over others.

    Fastest on a CPU without ``bias``, with ``allowed`` alike for all queries, and, where causal, with as many queries as keys.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, hk, m, d); ``hk`` divides ``h`` and query head ``i`` reads key head ``i // (h / hk)``; m may be 0.
        v: values (b, hk, m, e).
        scale: factor of the products; by default d ** -0.5.
        bias: added to the scaled products, broadcastable to (b, h, n, m).
        allowed: True where a query may use a key, broadcastable likewise.
        causal: key j is allowed for query i if j <= i + m - n. Pairs of the future take no work.
        key_mask: True marks a key that may be used.
        backend: "auto", "reference" or "eager".

    Raises:
        ValueError: for shapes that do not fit.
    """
    if q.dim() != 4 or k.shape[:3] != v.shape[:3] or len(k) != len(q) or k.shape[3] != q.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v: expected (b, h, n, d), (b, hk, m, d), (b, hk, m, e), got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides the {q.shape[1]} of q, got {k.shape[1]}")
    if key_mask is not None and key_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_mask: expected shape {(k.shape[0], k.shape[2])} to fit k, got {tuple(key_mask.shape)}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    function, (b, h), heads = PARTIAL_ATTENTION(backend, q), q.shape[:2], k.shape[1]
    group = h // heads
    if group > 1:  # the query heads of a group are the heads of one example, whose key head is a view
        q = q.unflatten(1, (heads, group)).flatten(0, 1)
        k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
        bias, allowed = (_by_group(x, b, heads, group) for x in (bias, allowed))
        key_mask = None if key_mask is None else key_mask.repeat_interleave(heads, dim=0)
    output, lse = function(q, k, v, scale=scale, bias=bias, allowed=allowed, causal=causal, key_mask=key_mask)
    if group > 1:
        output, lse = (x.unflatten(0, (b, heads)).flatten(1, 2) for x in (output, lse))
    return Partial(output, lse)


def _by_group(x: Shaped[Tensor, "#b #h #n #m"] | None, batch: int, heads: int, group: int) -> Tensor | None:
    """A tensor over pairs with key heads as examples."""
    if x is None or x.shape[:2] == (1, 1):
        return x
    return x.expand(batch, heads * group, -1, -1).unflatten(1, (heads, group)).flatten(0, 1)
