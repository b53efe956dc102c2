r"""Attention over vector-quantised keys: exact softmax over all keys through their codewords, in linear time.

Within the window around a query pairs are formed. Beyond it all keys of codeword c have the score $s\,q_i^\top C_c$, so that
their values are summed first: $e^{s q^\top C_c}$ are features of a query, the codeword of a key as a unit vector is a feature of
that key, and linear attention over keys that come w tokens late has the sums (Transformer-VQ, Lingle 2023, theorem 3.7). Both
parts are joined by their log-sum-exps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision
from attnlab.ops.linear_attention import linear_attention
from attnlab.ops.partial_attention import Partial, merge, partial_attention

_NONE = float("-inf")


def vq_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    codes: Int[Tensor, "b h m"],
    codebook: Float[Tensor, "h s d"],
    bias: Float[Tensor, "h r"],
    *,
    key_mask: Bool[Tensor, "b m"] | None = None,
    state: Float[Tensor, "b h s e1"] | None = None,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h s e1"] | None]:
    r"""Output, and the sums of what the window has left behind.

    For the query at position p, $o = \sum_j e^{s_j} v_j / \sum_j e^{s_j}$ with $s_j = d^{-1/2} q^\top k_j + B_{p-j}$ where
    $|p - j| < w$, and $d^{-1/2} q^\top C_{z_j}$ elsewhere. Time O(n (S + w)(d + e)), memory O(n (S + w + d + e)).

    Args:
        q: queries (b, h, n, d).
        k: quantised keys (b, h, m, d), read within the window. Causal: m = n + w, the w keys before the first query come first
            (masked where there are none). Not causal: m = n.
        v: values (b, h, m, e).
        codes: z (b, h, m).
        codebook: C (h, S, d), read beyond the window; keys get no gradient through it.
        bias: B by offset, (h, w) for p - j = 0, ..., w - 1 if causal, otherwise (h, 2 w - 1) for p - j = 1 - w, ..., w - 1.
        key_mask: (b, m), True marks a key that may be used.
        state: causal: for each codeword the sum of the values that are further back than the keys given, and their number
            (b, h, S, e + 1). None: not causal.

    Returns:
        The output (b, h, n, e), and the state after it or None. At a masked token the output has no meaning.
    """
    real = torch.ones_like(codes[:, 0], dtype=torch.bool) if key_mask is None else key_mask
    near = _window(q, k, v, bias, real, causal=state is not None)
    far, state = _beyond(q, v, codes, codebook, bias.shape[1], real, state)
    return merge(near, far).output.to(q.dtype), state


@full_precision
def _beyond(
    q: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h m e"],
    codes: Int[Tensor, "b h m"],
    codebook: Float[Tensor, "h s d"],
    reach: int,
    real: Bool[Tensor, "b m"],
    state: Float[Tensor, "b h s e1"] | None,
) -> tuple[Partial, Float[Tensor, "b h s e1"] | None]:
    """Attention over the keys beyond the window, and the state. Sums are in float32 or wider."""
    n, window = q.shape[2], reach if state is not None else (reach + 1) // 2
    wide = accumulate_dtype(q.dtype)
    words = q.shape[3] ** -0.5 * (q.to(wide) @ codebook.to(wide).mT)
    hot = F.one_hot(codes, codebook.shape[1]).to(wide) * real[:, None, :, None]
    sums = F.pad(v.to(wide), (0, 1), value=1.0)
    if state is None:
        # Totals minus the window would cancel where the window has most of the weight: each side is summed by itself.
        there = _late(_seen(hot, None), window) | _late(_seen(hot.flip(2), None), window).flip(2)
    else:
        there = _seen(hot[:, :, :n], state[..., -1] > 0)
    peak = words.detach().masked_fill(~there, _NONE).amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == _NONE, 0.0)
    weights = (words - peak).masked_fill(~there, _NONE).exp()
    if state is None:
        behind = _delayed(weights, hot, sums, window)
        far = behind + _delayed(weights.flip(2), hot.flip(2), sums.flip(2), window).flip(2)
    else:
        far, state = linear_attention(weights, hot[:, :, :n], sums[:, :, :n], initial_state=state)
    total = far[..., -1]
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (total.log() + peak[..., 0]).masked_fill(empty, _NONE)
    return Partial(far[..., :-1] / total.unsqueeze(-1), lse), state


def _seen(hot: Float[Tensor, "b h m s"], before: Bool[Tensor, "b h s"] | None) -> Bool[Tensor, "b h m s"]:
    """Which codewords occur up to each key, or were there before."""
    length = hot.shape[2]
    place = torch.arange(length, device=hot.device)[:, None]
    first = torch.where(hot > 0, place, length).amin(2, keepdim=True)
    if before is not None:
        first = first.masked_fill(before[:, :, None], -1)
    return first <= place


def _late(seen: Bool[Tensor, "b h n s"], window: int) -> Bool[Tensor, "b h n s"]:
    """The same ``window`` tokens later."""
    kept = max(seen.shape[2] - window, 0)
    return F.pad(seen[:, :, :kept], (0, 0, seen.shape[2] - kept, 0))


def _delayed(
    weights: Float[Tensor, "b h n s"], hot: Float[Tensor, "b h n s"], sums: Float[Tensor, "b h n e"], window: int
) -> Float[Tensor, "b h n e"]:
    """Linear attention of each query over the keys that are at least ``window`` tokens before it."""
    kept = weights.shape[2] - window
    if kept <= 0:
        return torch.zeros_like(sums)
    far, _ = linear_attention(weights[:, :, window:], hot[:, :, :kept], sums[:, :, :kept])
    return F.pad(far, (0, 0, window, 0))


def _window(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    bias: Float[Tensor, "h r"],
    real: Bool[Tensor, "b m"],
    *,
    causal: bool,
) -> Partial:
    """Attention over the keys of the window, in blocks of w queries with those around them; a token may always use itself."""
    b, n = len(q), q.shape[2]
    reach = bias.shape[1]
    window = reach if causal else (reach + 1) // 2
    size, count = min(n, window), -(-n // window)
    behind = window if causal or count > 1 else 0
    before, after = (0 if causal else behind), (0 if causal else behind) + count * size - n
    k, v, usable = F.pad(k, (0, 0, before, after)), F.pad(v, (0, 0, before, after)), F.pad(real, (before, after))
    if count > 1:
        parts = 2 if causal else 3
        k, v = (_neighbours(x, size, count, parts) for x in (k, v))
        usable = _neighbours(usable[:, None, :, None], size, count, parts)[:, 0, :, :, 0]
    else:
        k, v, usable = k[:, :, None], v[:, :, None], usable[:, None]
    rows, columns = (torch.arange(end, device=q.device) for end in (size, k.shape[3]))
    offset = rows[:, None] + behind - columns
    index = offset if causal else offset + window - 1
    inside = (index >= 0) & (index < reach)
    allowed = (inside & usable.unsqueeze(2)) | (offset == 0)
    q = F.pad(q, (0, 0, 0, count * size - n)).unflatten(2, (count, size))
    blocks = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    term = bias[:, index.clamp(0, reach - 1)][None]
    output, lse = partial_attention(*blocks, bias=term, allowed=allowed.flatten(0, 1).unsqueeze(1))
    output = output.unflatten(0, (b, count)).transpose(1, 2).flatten(2, 3)[:, :, :n]
    return Partial(output, lse.unflatten(0, (b, count)).transpose(1, 2).flatten(2, 3)[:, :, :n])


def _neighbours(x: Tensor, size: int, count: int, parts: int) -> Tensor:
    """Tokens (b, h, (count + parts - 1) size, d) as overlapping blocks (b, h, count, parts size, d)."""
    blocks = x.unflatten(2, (-1, size))
    return torch.cat([blocks[:, :, first : first + count] for first in range(parts)], dim=3)
