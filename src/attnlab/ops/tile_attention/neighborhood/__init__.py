"""Neighbourhood attention on grids of one, two or three axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.backends import Op
from attnlab.ops.neighborhoods import Axis, axes_of, neighborhood_mask
from attnlab.ops.partials import Partial, merge
from attnlab.ops.tile_attention import tile_attention
from attnlab.ops.tile_attention.neighborhood import eager, reference

__all__ = ["Axis", "axes_of", "neighborhood_attention", "neighborhood_mask"]

OP = Op("neighborhood_attention", {"reference": reference.attend, "eager": eager.attend})
"""The implementations, which take the rules of all axes, and a bias table or None."""


def neighborhood_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    *,
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    bias: Float[Tensor, "#h *offsets"] | None = None,
    extra_k: Float[Tensor, "b hk r d"] | None = None,
    extra_v: Float[Tensor, "b hk r e"] | None = None,
    key_mask: Bool[Tensor, "b n"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Partial:
    r"""Generalised neighbourhood attention (Hassani et al. 2025, arXiv 2504.16922), with the log-sum-exp.

    A query at $(i_1, \dots, i_r)$ sees the keys $(j_1, \dots, j_r)$ that are visible on every axis by the rule of `Axis`:

    $$o_i = \sum_{j \in N(i)} \mathrm{softmax}_j(s\, q_i^\top k_j + B_{j - i})\, v_j$$

    Stride 1 is the sliding neighbourhood of Hassani et al. 2023 (shifted at borders), stride = window attention inside blocks,
    a dilation above 1 that of Hassani and Shi 2022 (arXiv 2209.15001), window = grid attention over everything. Extra keys are
    seen by all queries, in the same softmax. Work O(n (w + tile)^r d), memory O(n d), backward too.

    Args:
        q: queries of the cells of a grid, row-major; h is a multiple of hk.
        k: keys of the same cells; query head i reads key head i // (h / hk).
        v: values, of any width e.
        grid: sides of the grid, product n.
        window: keys along each axis; one number, or one an axis.
        stride: neighbouring queries that share a window, likewise.
        dilation: distance of the keys of a window, likewise.
        causal: whether no later cell is seen, likewise.
        bias: B by offset along each axis in steps of its dilation, (1 or h, 2 w_1 - 1, ..., 2 w_r - 1), -(w - 1) first; added to
            the scaled products.
        extra_k: keys outside of the grid.
        extra_v: their values.
        key_mask: True marks a real cell. What stands at the others has no influence, nan included.
        scale: s, by default $d^{-1/2}$.
        backend: "auto", "reference" or "eager".

    Returns:
        ``output`` (b, h, n, e) and ``lse`` (b, h, n); a query without a key has 0 and -inf.

    Raises:
        TypeError: a tensor is not of the right dtype.
        ValueError: a shape or a rule does not fit the grid.
    """
    axes = axes_of(grid, window, stride, dilation, causal)
    _check(q, k, grid, axes, bias)
    if (extra_k is None) != (extra_v is None):
        raise ValueError("extra_k, extra_v: expected both or neither")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    local = Partial(*OP(backend, q)(q, k, v, axes, bias, key_mask, scale))
    if extra_k is None or extra_v is None:
        return local
    return merge(local, _over_all(q, extra_k, extra_v, scale, backend))


def _over_all(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Partial:
    """Every query over every key."""
    queries, keys = (torch.arange(t.shape[2], device=q.device)[None, None, None] for t in (q, k))
    found = tile_attention(q, k, v, queries, keys, scale=scale, backend=backend)
    return Partial(found.output.squeeze(2), found.lse.squeeze(2))


def _check(q: Tensor, k: Tensor, grid: Sequence[int], axes: Sequence[Axis], bias: Tensor | None) -> None:
    """Raise for what does not fit the grid."""
    if q.ndim != 4 or q.shape[2] != math.prod(grid) or k.shape[2:3] != q.shape[2:3]:
        raise ValueError(
            f"grid: expected a product of q's and k's tokens, got {tuple(grid)} for {tuple(q.shape)}, {tuple(k.shape)}"
        )
    wanted = tuple(2 * axis.window - 1 for axis in axes)
    if bias is not None and (tuple(bias.shape[1:]) != wanted or bias.shape[0] not in (1, q.shape[1])):
        raise ValueError(f"bias: expected (1 or {q.shape[1]}, {', '.join(map(str, wanted))}), got {tuple(bias.shape)}")
