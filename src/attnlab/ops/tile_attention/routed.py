"""Attention where every query chooses its own blocks of keys: the queries of a block are gathered, and the parts merged."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.chunks import common_dtype
from attnlab.ops.partials import Partial
from attnlab.ops.tile_attention import OP, tile_attention
from attnlab.ops.tile_attention.routed_kernels import forward, merged, tiles_of


def routed_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    chosen: Bool[Tensor, "b h n c"],
    blocks: Int[Tensor, "t y"],
    *,
    causal: bool = False,
    key_mask: Bool[Tensor, "b m"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Partial:
    r"""Softmax attention of each query over the keys of the blocks that it has chosen.

    $$o_i = \sum_{c \in C(i)} \sum_{j \in \mathrm{block}_c} \mathrm{softmax}_j(s\, q_i^\top k_j)\, v_j$$

    Work O(choices y (d + e)), memory O(choices e): no query's keys are gathered for it alone.

    Args:
        q: queries; h is a multiple of hk.
        k: keys.
        v: values.
        chosen: which blocks each query of each head uses.
        blocks: the places of each block's keys, -1 for none; a key may stand in one block alone.
        causal: a query uses no key from a later place.
        key_mask: True marks a real key.
        scale: s, by default $d^{-1/2}$.
        backend: that of `tile_attention`.

    Returns:
        ``output`` (b, h, n, e) and ``lse`` (b, h, n); a query without a key has 0 and -inf.

    Raises:
        ValueError: a shape does not fit the others.
    """
    if tuple(chosen.shape) != (*q.shape[:3], len(blocks)):
        raise ValueError(f"chosen: expected {(*q.shape[:3], len(blocks))}, got {tuple(chosen.shape)}")
    q, k, v = common_dtype(q=q, k=k, v=v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if 0 in (chosen.numel(), q.numel(), k.numel()):
        return Partial(q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], float("-inf")))
    found = OP.explain(backend, q).backend
    if found != "reference":
        return Partial(*forward(q, k, v, chosen, blocks, key_mask, causal, scale, found))
    queries, keys = tiles_of(chosen, blocks)
    parts = tile_attention(q, k, v, queries, keys, causal=causal, key_mask=key_mask, scale=scale, backend=found)
    return merged(parts, queries, q.shape[2])
