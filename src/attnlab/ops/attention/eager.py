"""Dense attention by PyTorch's SDPA where it has the slots, otherwise by blocks of queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.masks import allowed_pairs
from attnlab.ops.attention.blockwise import blockwise_attention
from attnlab.ops.attention.normalizers import Normalizer
from attnlab.ops.attention.pairwise import Pairwise


def attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    *,
    scale: float,
    bias: Pairwise,
    factor: Pairwise,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
    pair_mask: Bool[Tensor, "#b #h n m"] | None,
    normalizer: Normalizer,
) -> Float[Tensor, "b h n e"]:
    """The fast path; see `attnlab.ops.attention.attention`."""
    n, m = q.shape[2], k.shape[2]
    causal = causal and n > 1  # the last query sees every key, so one query needs no mask
    # SDPA has no gradient of a mask but through all n x m weights.
    learned = bias.dense is not None and bias.dense.requires_grad and torch.is_grad_enabled()
    if normalizer.name != "softmax" or bias.by_offset or factor != Pairwise() or learned:
        return blockwise_attention(
            q,
            k,
            v,
            scale=scale,
            bias=bias,
            factor=factor,
            causal=causal,
            key_mask=key_mask,
            pair_mask=pair_mask,
            normalizer=normalizer,
        )
    if causal and n == m and bias.dense is None and pair_mask is None:
        return (
            _sdpa(q, k, v, scale=scale, is_causal=True) if key_mask is None else _causal_with_key_mask(q, k, v, key_mask, scale)
        )
    dense = None if bias.dense is None else bias.dense.to(q.dtype)
    allowed = allowed_pairs(n, m, causal=causal, key_mask=key_mask, pair_mask=pair_mask, device=q.device)
    if allowed is None:
        return _sdpa(q, k, v, scale=scale, bias=dense)
    empty = ~allowed.any(dim=-1, keepdim=True)
    usable = allowed | empty  # an empty row is computed over all keys and then zeroed, so that no NaN arises
    out = _sdpa(q, k, v, scale=scale, bias=usable if dense is None else dense.masked_fill(~usable, float("-inf")))
    return out.masked_fill(empty, 0.0)


def _causal_with_key_mask(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    key_mask: Bool[Tensor, "b n"],
    scale: float,
) -> Float[Tensor, "b h n e"]:
    # One more column of q and k carries the key mask into the product, so that SDPA's own causal path serves and no n x n mask
    # is made. The column is padded to eight to keep the rows aligned, and the values as well: with widths that differ the fused
    # kernel steps aside and n x n weights are made after all.
    lowest, d, e = torch.finfo(q.dtype).min / 4, q.shape[-1], v.shape[-1]
    more = max(8, e - d)
    q_more = torch.zeros_like(q[..., :1]).expand(-1, -1, -1, more).clone()
    q_more[..., 0] = 1.0 / scale
    k_more = torch.zeros_like(k[..., :1]).expand(-1, -1, -1, more).clone()
    k_more[..., 0] = torch.zeros_like(key_mask, dtype=k.dtype).masked_fill(~key_mask, lowest * min(scale, 1.0))[:, None]
    values = F.pad(v, (0, d + more - e))
    out = _sdpa(torch.cat([q, q_more], -1), torch.cat([k, k_more], -1), values, scale=scale, is_causal=True)[..., :e]
    empty = key_mask.cumsum(dim=1) == 0
    return out.masked_fill(empty[:, None, :, None], 0.0)


def _sdpa(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    *,
    scale: float,
    bias: Tensor | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "b h n e"]:
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal, scale=scale)
    # The query heads of a group become the heads of one attention over a key head that is a stride-0 view.
    b, h, n, d = q.shape
    hk = k.shape[1]
    q = q.reshape(b * hk, groups, n, d)
    k = k.reshape(b * hk, 1, k.shape[2], d).expand(-1, groups, -1, -1)
    v = v.reshape(b * hk, 1, v.shape[2], v.shape[3]).expand(-1, groups, -1, -1)
    if bias is not None:
        bias = bias.expand(b, h, -1, -1).reshape(b * hk, groups, bias.shape[2], bias.shape[3])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal, scale=scale)
    return out.reshape(b, h, n, v.shape[3])
