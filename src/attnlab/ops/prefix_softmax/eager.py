r"""Softmax over prefixes in chunks: their sums apart, a scan over them, and the prefixes within each at once.

Token t of a chunk has $\sum_{j \le t} e^{s_j} v_j$ over the chunk's own tokens plus that of all chunks before, every exponential
taken of a difference to the largest score up to t: the weights of a chunk are a small triangular matrix. No score is compared
with a later one, so that a large score does not wipe out what came before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.chunks import full_precision

CHUNK = 32  # tokens
TILE = 64  # chunks

_NEVER = -1e30  # a score without weight: finite, so that the difference of two is 0 and not NaN


@full_precision
def prefix_softmax(
    scores: Float[Tensor, "b h n"], v: Float[Tensor, "b h n e"], mean: Float[Tensor, "b h e"], lse: Float[Tensor, "b h"]
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """What `attnlab.ops.prefix_softmax` documents; time and memory linear in n."""
    n = scores.shape[2]
    scores, lse = scores.clamp_min(_NEVER), lse.clamp_min(_NEVER)
    size = min(CHUNK, n)
    spare = -n % size
    s = F.pad(scores, (0, spare), value=_NEVER).unflatten(2, (-1, size))
    one = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
    values = F.pad(one, (0, 0, 0, spare)).unflatten(2, (-1, size))
    before, peak = _scan(s, values, torch.cat((mean, torch.ones_like(mean[..., :1])), dim=-1), lse)

    parts = [x.split(TILE, 2) for x in (s, values, before, peak)]
    means, totals = zip(*(_within(*tile) for tile in zip(*parts, strict=True)), strict=True)
    return torch.cat(means, 2)[:, :, :n], torch.cat(totals, 2)[:, :, :n]


def _within(
    s: Float[Tensor, "b h c t"],
    values: Float[Tensor, "b h c t e1"],
    before: Float[Tensor, "b h c e1"],
    peak: Float[Tensor, "b h c"],
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """The means and logarithms of all tokens of some chunks, from the sums before each."""
    highest = torch.maximum(s.detach().cummax(-1).values, peak.unsqueeze(-1))
    within = (s.unsqueeze(-2) - highest.unsqueeze(-1)).tril().exp().tril()
    sums = within @ values + (peak.unsqueeze(-1) - highest).exp().unsqueeze(-1) * before.unsqueeze(-2)
    sums, highest = (x.flatten(2, 3) for x in (sums, highest))
    weight = sums[..., -1]
    empty = highest <= _NEVER / 2
    total = torch.where(empty, float("-inf"), weight.masked_fill(empty, 1.0).log() + highest)
    return (sums[..., :-1] / weight.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0), total


def _scan(
    s: Float[Tensor, "b h c t"], values: Float[Tensor, "b h c t e1"], mean: Float[Tensor, "b h e1"], lse: Float[Tensor, "b h"]
) -> tuple[Float[Tensor, "b h c e1"], Float[Tensor, "b h c"]]:
    """Weighted sums of all that stands before each chunk, relative to a peak, and these peaks."""
    tops = s.detach().amax(-1)
    peaks = torch.cat((lse.detach().unsqueeze(-1), tops), dim=-1).cummax(-1).values
    own = ((s - tops.unsqueeze(-1)).exp().unsqueeze(-2) @ values).squeeze(-2)
    kept = (peaks[..., :-1] - peaks[..., 1:]).exp().unsqueeze(-1).unbind(2)
    added = ((tops - peaks[..., 1:]).exp().unsqueeze(-1) * own).unbind(2)
    running = (lse - peaks[..., 0]).exp().unsqueeze(-1) * mean
    sums = [running]
    for keep, add in zip(kept[:-1], added[:-1], strict=True):
        running = torch.addcmul(add, keep, running)
        sums.append(running)
    return torch.stack(sums, 2), peaks[..., :-1]
