"""Softmax attention as cascades of reductions over the keys, by the number of passes that each needs (FuseMax)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.ops.executions import Counts, execution, real_keys

TILE = 128


class _Keys:
    """Keys and values by tiles, and the tally of what is done with them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, counts: Counts | None) -> None:
        self.q, self.k, self.v, self.lengths = q * q.shape[-1] ** -0.5, k, v, lengths
        self.counts = Counts() if counts is None else counts
        self.rows = q.shape[0] * q.shape[1] * q.shape[2]

    def tiles(self) -> Iterator[slice]:
        """One pass."""
        self.counts.passes += 1
        for start in range(0, self.k.shape[2], TILE):
            yield slice(start, min(start + TILE, self.k.shape[2]))

    def logits(self, tile: slice) -> Float[Tensor, "b h n t"]:
        """Logits of a tile, -inf at padding."""
        keys = self.k[:, :, tile]
        self.counts.reads += keys.numel()
        logits = self.q @ keys.mT
        real = real_keys(self.lengths, tile.start, tile.stop)
        return logits if real is None else logits.masked_fill(~real, float("-inf"))

    def weights(self, logits: Tensor, peak: Tensor) -> Tensor:
        """exp(logits - peak), 0 where all is -inf."""
        self.counts.exponentials += logits.numel()
        return (logits - peak.masked_fill(peak == float("-inf"), 0.0)).exp()

    def mix(self, weights: Tensor, tile: slice) -> Tensor:
        """Weights times values of a tile."""
        values = self.v[:, :, tile]
        self.counts.reads += values.numel()
        return weights @ values

    def stored(self, *tensors: list[Tensor]) -> None:
        """Note what is kept from one pass to the next."""
        self.counts.live = max(self.counts.live, sum(t.numel() for some in tensors for t in some))

    def load(self, stored: Tensor) -> Tensor:
        """Read what an earlier pass kept."""
        self.counts.reads += stored.numel()
        return stored

    def divide(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """A quotient; 0 where there is nothing to divide by."""
        self.counts.divisions += numerator.numel()
        return numerator / denominator.masked_fill(denominator == 0.0, 1.0)

    def nothing(self, value: float) -> Float[Tensor, "b h n 1"]:
        """The start of a running maximum or sum."""
        return self.q.new_full((*self.q.shape[:3], 1), value)


@execution("naive", family="cascade", paper="fusemax")
def naive(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    lengths: Int[Tensor, "b"] | None = None,
    counts: Counts | None = None,
) -> Float[Tensor, "b h n e"]:
    r"""Two passes without a maximum: $D = \sum_j e^{s_j}$, then $\sum_j (e^{s_j} / D)\, v_j$; overflows for large logits."""
    keys = _Keys(q, k, v, lengths, counts)
    kept = [keys.weights(keys.logits(tile), keys.nothing(0.0)) for tile in keys.tiles()]
    keys.stored(kept)
    total = torch.stack([w.sum(-1, keepdim=True) for w in kept]).sum(0)
    parts = [keys.mix(keys.divide(keys.load(w), total), tile) for w, tile in zip(kept, keys.tiles(), strict=True)]
    return torch.stack(parts).sum(0)


@execution("three_pass", family="cascade", paper="fusemax")
def three_pass(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    lengths: Int[Tensor, "b"] | None = None,
    counts: Counts | None = None,
) -> Float[Tensor, "b h n e"]:
    r"""The textbook's order: $M = \max_j s_j$; $w_j = e^{s_j - M}$ and $D = \sum_j w_j$; $\sum_j (w_j / D)\, v_j$."""
    keys = _Keys(q, k, v, lengths, counts)
    logits = [keys.logits(tile) for tile in keys.tiles()]
    peak = torch.stack([s.amax(-1, keepdim=True) for s in logits]).amax(0)
    kept = [keys.weights(keys.load(s), peak) for s, _ in zip(logits, keys.tiles(), strict=True)]
    keys.stored(kept)
    total = torch.stack([w.sum(-1, keepdim=True) for w in kept]).sum(0)
    parts = [keys.mix(keys.divide(keys.load(w), total), tile) for w, tile in zip(kept, keys.tiles(), strict=True)]
    return torch.stack(parts).sum(0)


@execution("deferred_division", family="cascade", paper="fusemax")
def deferred_division(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    lengths: Int[Tensor, "b"] | None = None,
    counts: Counts | None = None,
) -> Float[Tensor, "b h n e"]:
    r"""Two passes, the division at the end: $M$; then $\sum_j e^{s_j - M} v_j \,/\, \sum_j e^{s_j - M}$."""
    keys = _Keys(q, k, v, lengths, counts)
    logits = [keys.logits(tile) for tile in keys.tiles()]
    keys.stored(logits)
    peak = torch.stack([s.amax(-1, keepdim=True) for s in logits]).amax(0)
    total, mixed = keys.nothing(0.0), q.new_zeros(*q.shape[:3], v.shape[3])
    for s, tile in zip(logits, keys.tiles(), strict=True):
        weights = keys.weights(keys.load(s), peak)
        total, mixed = total + weights.sum(-1, keepdim=True), mixed + keys.mix(weights, tile)
    return keys.divide(mixed, total)


@execution("two_pass", family="cascade", paper="fusemax")
def two_pass(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    lengths: Int[Tensor, "b"] | None = None,
    counts: Counts | None = None,
) -> Float[Tensor, "b h n e"]:
    r"""Two passes by local maxima: $w_j = e^{s_j - M_t}$ within tile t; then each is corrected by $e^{M_t - M}$ and mixed."""
    keys = _Keys(q, k, v, lengths, counts)
    kept, peaks = [], []
    for tile in keys.tiles():
        logits = keys.logits(tile)
        peaks.append(logits.amax(-1, keepdim=True))
        kept.append(keys.weights(logits, peaks[-1]))
    keys.stored(kept)
    peak = torch.stack(peaks).amax(0)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    total, mixed = keys.nothing(0.0), q.new_zeros(*q.shape[:3], v.shape[3])
    for weights, local, tile in zip(kept, peaks, keys.tiles(), strict=True):
        corrected = keys.load(weights) * (local - peak).exp()
        total, mixed = total + corrected.sum(-1, keepdim=True), mixed + keys.mix(corrected, tile)
    return keys.divide(mixed, total)


@execution("one_pass", family="cascade", paper="fusemax")
def one_pass(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    lengths: Int[Tensor, "b"] | None = None,
    counts: Counts | None = None,
) -> Float[Tensor, "b h n e"]:
    r"""One pass with a running maximum: sums so far are multiplied by $e^{M_{t-1} - M_t}$; nothing grows with the keys."""
    keys = _Keys(q, k, v, lengths, counts)
    peak, total, mixed = keys.nothing(float("-inf")), keys.nothing(0.0), q.new_zeros(*q.shape[:3], v.shape[3])
    for tile in keys.tiles():
        logits = keys.logits(tile)
        after = torch.maximum(peak, logits.amax(-1, keepdim=True))
        weights = keys.weights(logits, after)
        keys.stored([weights])
        # Before the first real key both maxima are -inf and the sums 0: any finite factor serves.
        correction = (peak - after).masked_fill(after == float("-inf"), 0.0).exp()
        total = total * correction + weights.sum(-1, keepdim=True)
        mixed, peak = mixed * correction + keys.mix(weights, tile), after
    return keys.divide(mixed, total)
