"""Sliding-window attention: softmax over the keys around each query, with optional sinks."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.backends import Op
from attnlab.ops.chunks import common_dtype
from attnlab.ops.sliding_window import eager, reference

OP = Op("sliding_window", {"reference": reference.attend, "eager": eager.attend})
"""The implementations, which take tensors of one dtype and every option."""


def sliding_window_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    *,
    left: int,
    right: int = 0,
    num_sinks: int = 0,
    key_mask: Bool[Tensor, "b m"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n e"]:
    r"""Softmax attention in a band, as in Longformer (Beltagy et al. 2020), with the sinks of StreamingLLM (Xiao et al. 2024).

    Query i stands at position $p = i + m - n$, the last query at the last key, and uses the keys $K_i$: those $0 \le j < m$
    that the mask leaves and for which $j \le p + \mathrm{right}$, and $j \ge p - \mathrm{left}$ or $j < \mathrm{sinks}$.

    $$o_i = \sum_{j \in K_i} \frac{e^{s\,\langle q_i, k_j \rangle}}{\sum_{l \in K_i} e^{s\,\langle q_i, k_l \rangle}}\, v_j$$

    With ``right=0`` it is causal and sees ``left + 1`` keys, its own among them. A query without a key gives exactly 0, and
    gradients of 0. Work O(n (left + right)), memory O(n + m). One query is a single call of SDPA on the keys in reach.

    Args:
        q: queries; h is a multiple of hk.
        k: keys; query head i reads key head i // (h / hk), and keys are not repeated in memory.
        v: values, of any width e.
        left: how many keys before its own position a query sees, >= 0.
        right: how many keys after its own position a query sees, >= 0.
        num_sinks: how many of the first keys given are seen from everywhere, but not from more than ``right`` before them.
        key_mask: True marks a real key. What stands at the others has no influence, nan included.
        scale: s, by default $d^{-1/2}$.
        backend: "auto", "reference" or "eager".

    Returns:
        The outputs, in the common dtype of q, k and v; half precisions are computed in float32.

    Raises:
        TypeError: a tensor is not of a floating dtype, or the mask not of bool.
        ValueError: a shape does not fit the others, or a count is negative.
        BackendUnavailableError: an explicit ``backend`` cannot run here.
    """
    _check(q, k, v, left, right, num_sinks, key_mask)
    q, k, v = common_dtype(q=q, k=k, v=v)
    if q.shape[2] == 0 or k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return OP(backend, q)(q, k, v, key_mask, left, right, num_sinks, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, num_sinks: int, key_mask: Tensor | None) -> None:
    """Raise for what `sliding_window_attention` cannot take."""
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes (batch, heads, tokens, width), got shape {tuple(tensor.shape)}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected batch, heads and tokens of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k: expected the batch and width of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides the {q.shape[1]} of q, got {k.shape[1]}")
    for name, count in {"left": left, "right": right, "num_sinks": num_sinks}.items():
        if count < 0:
            raise ValueError(f"{name}: expected an integer >= 0, got {count}")
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask: expected bool, True at real keys, got {key_mask.dtype}")
    if key_mask is not None and key_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_mask: expected shape {(k.shape[0], k.shape[2])} to fit k, got {tuple(key_mask.shape)}")
