r"""Products with Toeplitz matrices, plain and weighted by a kernel of queries and keys, in O(n log n) by Fourier transform.

A table t of n + m - 1 numbers a head stores the matrix $T_{ij} = t_{j-i}$ as `attnlab.ops.attention.Pairwise.offsets` does: the
last query stands at the last key, and row $r + m - 1$ belongs to key position minus query position r.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import Op, accumulate_dtype
from attnlab.ops.chunks import common_dtype
from attnlab.ops.toeplitz import eager, reference

OP = Op("toeplitz", {"reference": reference.attend, "eager": eager.attend})
"""The implementations of `toeplitz_linear_attention`, of which the plain product is the case of one feature that is 1."""

__all__ = ["OP", "toeplitz_linear_attention", "toeplitz_matmul"]


def toeplitz_matmul(
    values: Float[Tensor, "#h r"], x: Float[Tensor, "b h m c"], *, causal: bool = False, backend: str = "auto"
) -> Float[Tensor, "b h n c"]:
    r"""A Toeplitz matrix a head times its tokens: $y_i = \sum_j t_{j-i}\, x_j$.

    Time O((n + m) log(n + m) c), memory O((n + m) c) and one block of columns.

    Args:
        values: t by offset, of which there are n + m - 1.
        x: the tokens.
        causal: $t_r = 0$ for r > 0, whatever ``values`` has there.
        backend: "auto", "reference" (the dense matrix) or "eager" (Fourier transform, in float64).

    Returns:
        (b, h, n, c) in the common dtype. By Fourier transform rounding errors reach the rows before a causal token, too, where a
        dense product has none.

    Raises:
        TypeError: a tensor is not of a floating dtype.
        ValueError: a shape does not fit the others.
    """
    _check_table(values, x)
    ones = torch.ones_like(x[..., :1])
    queries = x.new_ones(*x.shape[:2], values.shape[1] - x.shape[2] + 1, 1)
    return toeplitz_linear_attention(values, queries, ones, x, causal=causal, backend=backend)


def toeplitz_linear_attention(
    values: Float[Tensor, "#h r"],
    q: Float[Tensor, "b h n f"],
    k: Float[Tensor, "b h m f"],
    v: Float[Tensor, "b h m e"],
    *,
    causal: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b h n e"]:
    r"""Linear attention with a weight by offset and without a denominator: $o_i = \sum_j t_{j-i}\, (q_i^\top k_j)\, v_j$.

    For each feature one Toeplitz product with the values times that feature of their keys, the result times that of the queries
    (Luo et al. 2021). Time O((n + m) log(n + m) f e). Features are taken a few at a time, and again in the backward pass, so that
    memory is O((n + m)(f + e)) and one block, not O((n + m) f e).

    Args:
        values: t by offset, of which there are n + m - 1.
        q: features of the queries.
        k: features of the keys.
        v: the values; a column of ones gives the denominator.
        causal: $t_r = 0$ for r > 0, whatever ``values`` has there.
        backend: "auto", "reference" (all pairs) or "eager".

    Raises:
        TypeError: a tensor is not of a floating dtype.
        ValueError: a shape does not fit the others.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2]:
        raise ValueError(
            "q, k, v: expected shapes (b, h, n, f), (b, h, m, f) and (b, h, m, e), "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"k: expected {q.shape[3]} features as q, got {k.shape[3]}")
    _check_table(values, v)
    n, m = q.shape[2], k.shape[2]
    if values.shape[1] != n + m - 1:
        raise ValueError(f"values: expected n + m - 1 = {n + m - 1} offsets, got {values.shape[1]}")
    values, q, k, v = common_dtype(values=values, q=q, k=k, v=v)
    if causal:
        values = F.pad(values[:, :m], (0, n - 1))
    sums = accumulate_dtype(v.dtype)
    table = values.expand(q.shape[1], -1).to(sums)
    out: Tensor = OP(backend, v)(table, q.to(sums), k.to(sums), v.to(sums))
    return out.to(v.dtype)


def _check_table(values: Tensor, x: Tensor) -> None:
    if x.ndim != 4 or x.shape[2] == 0:
        raise ValueError(f"x: expected (b, h, m, c) with m >= 1, got {tuple(x.shape)}")
    _, heads, m, _ = x.shape
    if values.ndim != 2 or values.shape[0] not in (1, heads) or values.shape[1] < m:
        raise ValueError(f"values: expected ({heads} or 1, n + m - 1) with n >= 1 and m = {m}, got {tuple(values.shape)}")
