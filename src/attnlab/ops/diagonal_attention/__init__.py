r"""Softmax attention along diagonals: every query of a head uses the keys at the same few distances from it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.backends import Op
from attnlab.ops.chunks import common_dtype
from attnlab.ops.diagonal_attention import eager, reference
from attnlab.ops.partials import Partial

OP = Op("diagonal_attention", {"reference": reference.attend, "eager": eager.attend})
"""The implementations, which take every argument, the keys allowed among them."""


def diagonal_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    distances: Int[Tensor, "b h r"],
    *,
    allowed: Bool[Tensor, "b #h m"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Partial:
    r"""Softmax attention of each query i over the keys $i - \delta$ of its head's distances, with the log-sum-exp.

    $$o_i = \sum_\delta e^{s\, q_i^\top k_{i - \delta} - \mathrm{lse}_i}\, v_{i - \delta}, \qquad
      \mathrm{lse}_i = \log \sum_\delta e^{s\, q_i^\top k_{i - \delta}}$$

    A distance that is named twice counts twice; keys before the first or behind the last are none, so a distance of m + n is one
    of no key. A query without a key has o = 0 and lse = -inf. A diagonal is read through shifted views, no query's keys are
    gathered. Work O(n r (d + e)); memory O(n (d + e)) and the scores of some queries at a time, backward too.

    Args:
        q: queries; h is a multiple of hk.
        k: keys; query head i reads key head i // (h / hk), and keys are not repeated in memory.
        v: values, of any width e.
        distances: $\delta$ of each head, below 0 for keys behind their query.
        allowed: which keys take part, all by default. What stands at the others has no influence, nan included.
        scale: s, by default $d^{-1/2}$.
        backend: "auto", "reference" or "eager", which goes from diagonal to diagonal: one for CPUs.

    Returns:
        ``output`` (b, h, n, e) in the common dtype of q, k and v, and ``lse`` (b, h, n), both differentiable.

    Raises:
        TypeError: a tensor is not of the right dtype.
        ValueError: a shape does not fit the others.
        BackendUnavailableError: an explicit ``backend`` cannot run here.
    """
    _check(q, k, v, distances, allowed)
    q, k, v = common_dtype(q=q, k=k, v=v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if 0 in (q.numel(), k.numel(), distances.numel()):
        return Partial(q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], float("-inf")))
    return Partial(*OP(backend, q)(q, k, v, distances, allowed, scale))


def _check(q: Tensor, k: Tensor, v: Tensor, distances: Tensor, allowed: Tensor | None) -> None:
    """Raise for what `diagonal_attention` cannot take."""
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes (batch, heads, tokens, width), got shape {tuple(tensor.shape)}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected batch, heads and tokens of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k: expected the batch and width of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides the {q.shape[1]} of q, got {k.shape[1]}")
    if distances.dtype != torch.int64:
        raise TypeError(f"distances: expected int64, got {distances.dtype}")
    if distances.ndim != 3 or distances.shape[:2] != q.shape[:2]:
        raise ValueError(f"distances: expected {tuple(q.shape[:2])} and any number, got {tuple(distances.shape)}")
    if allowed is None:
        return
    if allowed.dtype != torch.bool:
        raise TypeError(f"allowed: expected bool, True at keys that take part, got {allowed.dtype}")
    if allowed.ndim != 3 or allowed.shape[1] not in (1, q.shape[1]) or allowed.shape[::2] != k.shape[::2]:
        raise ValueError(f"allowed: expected {(len(q), q.shape[1], k.shape[2])}, heads or 1, got {tuple(allowed.shape)}")
