"""Shifted sparse attention: groups of a sequence, which begin half a group later for some of the heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.ops.tile_attention import tile_attention


@mixers.register(
    "shifted_sparse",
    family="partitioned",
    paper="sinklora",
    supports=Supports(causal="optional", mixing_matrix=True, cost=1.0),
    example={"group": 4, "num_sinks": 2},
)
class ShiftedSparseAttention(AttentionMixer):
    r"""Softmax attention inside groups, shifted in some heads, and sinks (Zhang 2024, SinkLoRA; Chen et al. 2023, LongLoRA).

    With groups of G tokens and head h, of which the last $h_s$ of all are shifted by $\sigma = \lceil G/2 \rceil$,

    $$g_h(i) = \lfloor (i - \sigma_h) / G \rfloor, \qquad
      N_h(i) = \{j : g_h(j) = g_h(i)\} \cup \{0, \dots, s - 1\}, \qquad
      o_i = \sum_{j \in N_h(i)} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j)\, v_j$$

    and each of the s sinks attends to all tokens; with ``causal=True`` only $j \le i$ is used of all this. The groups of shifted
    heads end at the ends of the sequence. Time O(n (G + s) d), memory O(n d).

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        group: G. The authors take a quarter of the length in training.
        num_shifted: $h_s$; by default half the heads, rounded up. SF-Attn gives a part of these back to the order without shift.
        num_sinks: s, leading tokens that see all and are seen by all; the paper has about 4.
        wrapped: the released S2-Attn, with ``causal=False`` alone, for it looks ahead: the sequence of shifted heads is a ring,
            its last group holds the last tokens and then the first $\sigma$, and a token uses those before it in its group; so
            do the other heads.
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for sizes out of their range, ``wrapped`` with ``causal=True`` or with sinks, or a position that is a bias.

    Differs from the paper: the released code has no SF-Attn, and its attention is ``wrapped=True``: the first tokens see the
    last ones there, in training, while it calls itself causal; no option of it is called causal here. For an odd G its outputs
    come back one place off (it shifts by one number and back by another); they are at their places here. Inference in the paper
    is dense attention with an evicting cache, and the low-rank training is not part of the mechanism. A sequence reaches from its
    first real token to its last, wherever padding stands.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        group: int = 2048,
        num_shifted: int | None = None,
        num_sinks: int = 0,
        wrapped: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        num_shifted = num_heads - num_heads // 2 if num_shifted is None else num_shifted
        if group < 1:
            raise ValueError(f"group: expected at least 1, got {group}")
        if not 0 <= num_shifted <= num_heads:
            raise ValueError(f"num_shifted: expected 0 to num_heads={num_heads}, got {num_shifted}")
        if num_sinks < 0:
            raise ValueError(f"num_sinks: expected at least 0, got {num_sinks}")
        if wrapped and (self.causal or num_sinks):
            raise ValueError("wrapped: expected False with causal=True or sinks; its first tokens see the last ones")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; groups have no bias")
        self.group, self.num_shifted, self.num_sinks, self.wrapped = group, num_shifted, num_sinks, wrapped

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax inside each group and over the sinks."""
        n = q.shape[2]
        span = _Span.of(n, masks.key, q.device)
        tiles = self._wrapped(n, span) if self.wrapped else self._groups(n, span)
        if not self.num_sinks:
            rank = None
            if self.wrapped:
                above = torch.ones(self.group, self.group, dtype=torch.bool, device=q.device).triu(1)
                rank = q.new_zeros(1, 1, self.group, self.group).masked_fill(above, float("-inf"))
            found = tile_attention(q, k, v, tiles, tiles, bias=rank, causal=self.causal, key_mask=masks.key).output
            return _in_place(found.flatten(2, 3), tiles.flatten(2), n)
        sinks = (span.first + torch.arange(self.num_sinks, device=q.device))[:, None, None]
        sinks = sinks.masked_fill(sinks >= span.end[:, None, None], -1)
        others = tiles.masked_fill(tiles < (span.first + self.num_sinks)[:, None, None], -1)
        keys = torch.cat((sinks.expand(*others.shape[:3], -1), others), dim=-1)
        if self.causal:  # what a sink may see are sinks, which every group has
            found = tile_attention(q, k, v, tiles, keys, causal=True, key_mask=masks.key).output
            return _in_place(found.flatten(2, 3), tiles.flatten(2), n)
        found = tile_attention(q, k, v, others, keys, key_mask=masks.key).output
        every = torch.arange(n, device=q.device)[None, None, None]
        first = tile_attention(q, k, v, sinks, every, key_mask=masks.key).output
        places = torch.cat((others.flatten(2), sinks.flatten(2).expand(*others.shape[:2], -1)), dim=2)
        return _in_place(torch.cat((found.flatten(2, 3), first.flatten(2, 3)), dim=2), places, n)

    def _groups(self, n: int, span: _Span) -> Int[Tensor, "#b h t x"]:
        """The places of each head's groups, so many for both kinds of head; -1 for none."""
        shift = self._shifts(span.first.device)
        begin = shift - self.group * (shift > 0).long()
        count = -(-n // self.group) + 1
        places = torch.arange(count * self.group, device=shift.device).view(count, self.group) + begin[:, None, None]
        places = places + span.first[:, None, None]
        return places.masked_fill((places < span.first[:, None, None]) | (places >= span.end[:, None, None]), -1)

    def _wrapped(self, n: int, span: _Span) -> Int[Tensor, "#b h t x"]:
        """The places of each head's groups on a ring."""
        count = -(-n // self.group)
        rank = torch.arange(count * self.group, device=span.first.device)
        length = span.end - span.first
        ring = span.first[:, None] + (rank + self._shifts(rank.device)[None, :, None]) % length[:, None]
        return ring.masked_fill(rank >= length[:, None], -1).unflatten(2, (count, self.group))

    def _shifts(self, device: torch.device) -> Int[Tensor, "h"]:
        """The place where the first whole group of each head begins."""
        head = torch.arange(self.num_heads, device=device)
        return (head >= self.num_heads - self.num_shifted).long() * -(-self.group // 2)


class _Span(NamedTuple):
    """Where each sequence begins and ends, its first real token and the place behind its last: (#b, 1)."""

    first: Int[Tensor, "#b 1"]
    end: Int[Tensor, "#b 1"]

    @classmethod
    def of(cls, n: int, mask: Bool[Tensor, "b n"] | None, device: torch.device) -> _Span:
        """Of n places; one without a real token is the last place alone."""
        if mask is None:
            return cls(torch.zeros(1, 1, dtype=torch.int64, device=device), torch.full((1, 1), n, device=device))
        place = torch.arange(n, device=device)
        first = torch.where(mask, place, n - 1).amin(1, keepdim=True)
        return cls(first, torch.maximum(torch.where(mask, place, -1).amax(1, keepdim=True), first) + 1)


def _in_place(rows: Float[Tensor, "b h r e"], places: Int[Tensor, "#b #h r"], n: int) -> Float[Tensor, "b h n e"]:
    """What stands for each token among rows of tiles, zeros for a token that has no row; no token has two."""
    b, h, r, e = rows.shape
    place = torch.where(places < 0, n, places).expand(-1, h, -1)
    inverse = torch.full((*place.shape[:2], n + 1), r, device=rows.device)
    inverse = inverse.scatter(2, place, torch.arange(r, device=rows.device).expand_as(place))[..., :n]
    rows = torch.cat((rows, rows.new_zeros(b, h, 1, e)), dim=2)
    return rows.gather(2, inverse.expand(b, -1, -1).unsqueeze(-1).expand(-1, -1, -1, e))
