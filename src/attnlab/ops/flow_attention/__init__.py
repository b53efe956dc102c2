r"""Causal flow attention: sinks (queries) and sources (keys) of a flow network share out what passes between them.

With features $q_i, k_j$, $\langle a, b \rangle = (a + \epsilon)^\top (b + \epsilon)$ entry by entry, and f the number of real
tokens up to the current one, for one head

$$I_i = \tfrac1f \langle q_i, \textstyle\sum_{j \le i} k_j \rangle, \quad O_j = \tfrac1f \langle k_j, \sum_{i \le j} q_i \rangle,
  \quad \hat I_i = \tfrac1f \langle q_i, \sum_{j \le i} k_j / O_j \rangle, \quad
  \hat O_j = \tfrac1f \langle k_j, \sum_{i \le j} q_i / I_i \rangle ,$$

$$o_i = \frac{\sigma(\hat I_i)}{f I_i}\, q_i^\top \sum_{j \le i} k_j\, c_j\, v_j^\top, \qquad
  c_j = f\, \frac{e_j}{\sum_{l \le j} e_l}, \quad e_j = \exp(\hat O_j \text{ cut to } [-1, 1]) .$$

Causal form of Wu et al. 2022 (Flowformer, arXiv 2202.06258, equations 4 to 8). All sums are of products $q_i^\top k_j$, which a
chunk of tokens forms once; between chunks they are states. Not causal every sum is one product, and no operator is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.backends import Op, accumulate_dtype
from attnlab.ops.chunks import common_dtype
from attnlab.ops.flow_attention import eager, reference

FLOW_ATTENTION = Op("flow_attention", {"reference": reference.flow_attention, "eager": eager.flow_attention})

__all__ = ["FLOW_ATTENTION", "FlowSums", "Flows", "flow_attention"]


class FlowSums(NamedTuple):
    """What a stream goes on from: sums over the tokens so far, and their number.

    Args:
        products: of keys, times competition, and values.
        sources: of keys over their outflows.
        keys: of keys.
        sinks: of queries over their inflows.
        queries: of queries.
        competition: of the exponentials of conserved outflows.
        number: of real tokens.
    """

    products: Float[Tensor, "b h d e"]
    sources: Float[Tensor, "b h d"]
    keys: Float[Tensor, "b h d"]
    sinks: Float[Tensor, "b h d"]
    queries: Float[Tensor, "b h d"]
    competition: Float[Tensor, "b h"]
    number: Int[Tensor, " b"]

    @classmethod
    def zeros(cls, q: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"]) -> FlowSums:
        """Before the first token."""
        wide, (b, h, _, d) = accumulate_dtype(q.dtype), q.shape
        sums = (q.new_zeros(b, h, *width, dtype=wide) for width in ((d, v.shape[-1]), (d,), (d,), (d,), (d,), ()))
        return cls._make((*sums, torch.zeros(b, dtype=torch.int64, device=q.device)))


class Flows(NamedTuple):
    r"""The flow of each token: $I_i$, $\sigma(\hat I_i)$ and $c_j$; a query's weight is the second over f times the first."""

    inflow: Float[Tensor, "b h n"]
    allocation: Float[Tensor, "b h n"]
    competition: Float[Tensor, "b h n"]


def flow_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    *,
    eps: float = 1e-6,
    mask: Bool[Tensor, "b n"] | None = None,
    initial: FlowSums | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b h n e"], Flows, FlowSums]:
    r"""Output, flows, and the sums after the last token; any split that hands the sums on gives the output of one pass.

    Args:
        q: features of queries (b, h, n, d), not negative.
        k: features of keys (b, h, n, d), not negative.
        v: values (b, h, n, e). Where the dtypes of q, k and v differ, the widest is taken for all.
        eps: $\epsilon$, positive.
        mask: True marks a real token, (b, n); the others are in no sum. None: all.
        initial: sums over the tokens before; None: there are none.
        backend: "auto", "reference" (token by token) or "eager" (chunks of 64; gradients once differentiable).

    Returns:
        The output (b, h, n, e) in the dtype of the inputs, 0 as long as no token counted; flows and sums, in float32 for half
        precisions.

    Raises:
        TypeError: for tensors that are not floating point.
        ValueError: for shapes that do not fit, an empty sequence, or an ``eps`` that is not positive.
        UnknownNameError: for an unknown backend.
    """
    q, k, v = common_dtype(q=q, k=k, v=v)
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3] or q.shape[2] == 0:
        got = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"q, k, v: expected (b, h, n, d) twice and (b, h, n, e) with n >= 1, got {got}")
    if eps <= 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    if mask is not None and mask.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"mask: expected shape {(q.shape[0], q.shape[2])}, got {tuple(mask.shape)}")
    wide, none = accumulate_dtype(q.dtype), FlowSums.zeros(q, v)
    first = none if initial is None else FlowSums._make((*(x.to(wide) for x in initial[:-1]), initial.number))
    for name, x, zero in zip(FlowSums._fields, first, none, strict=True):
        if x.shape != zero.shape:
            raise ValueError(f"initial.{name}: expected shape {tuple(zero.shape)}, got {tuple(x.shape)}")
    if mask is not None:
        q, k = (x.masked_fill(~mask[:, None, :, None], 0.0) for x in (q, k))
    ones = torch.ones(q.shape[0], q.shape[2], dtype=torch.int64, device=q.device) if mask is None else mask.long()
    number = ones.cumsum(1) + first.number[:, None]
    function = FLOW_ATTENTION(backend, q)
    o, flows, after = function(q.to(wide), k.to(wide), v.to(wide), number.clamp(min=1).to(wide), mask, tuple(first[:-1]), eps)
    return o.to(v.dtype), Flows._make(flows), FlowSums._make((*after, number[:, -1]))
