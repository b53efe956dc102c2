"""HyperAttention: blocks of hashed and sorted keys, and a sample of the others, merged by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.first_real import from_first_real
from attnlab.mixers.sparse.angular_lsh import AngularLSH
from attnlab.mixers.sparse.hyper_tiles import Side, hyper_tiles, to_tokens
from attnlab.mixers.sparse.leaves import causal_leaves
from attnlab.ops.attention import attention
from attnlab.ops.partials import Partial, merge
from attnlab.ops.tile_attention import tile_attention

Join = Callable[[Partial, Partial], Partial]

UNIT = 2**31
"""Samples are drawn below it."""
STEP = 1327217885
"""The golden ratio's share of it, by which samples move from half to half; products of both with a length fit in 64 bits."""


@mixers.register(
    "hyper_attention",
    family="sparse",
    paper="hyper-attention",
    supports=Supports(causal="optional", cross=True, mixing_matrix=True, discontinuous=True, cost=1.0),
    example={"block": 4, "num_samples": 4, "min_exact": 5, "num_projections": 3},
)
class HyperAttention(AttentionMixer):
    r"""Near-linear softmax attention by sorting and sampling (Han et al. 2023, HyperAttention, algorithms 1 to 4).

    Queries and keys are sorted by the buckets of an angular hash (`AngularLSH`), and the i-th block of queries attends to the
    i-th block of keys, D(i). The other keys are estimated from s of all m, drawn with replacement, $R \subset [m]$:

    $$e^{S_1} = \sum_{j \in D(i)} e^{z_{ij}}, \quad e^{S_2} = \frac{m}{s} \sum_{j \in R} e^{z_{ij}}, \quad
      o_i = \frac{e^{S_1} o^D_i + e^{S_2} o^R_i}{e^{S_1} + e^{S_2}}, \qquad z_{ij} = d^{-1/2}\, q_i^\top k_j .$$

    Where causal, the sequence is cut into leaves of ``min_exact`` tokens, exact in themselves, and of each two halves of 2, 4,
    ... leaves the later one attends to the earlier in this way. Sequences that are shorter, or no longer than that where causal,
    are exact, and one block is dense attention. Time O(n (b + s) d + n log n), times log n where causal, and memory O(n (d + s))
    for blocks of b keys.

    In the published recursion a query's block is that of its rank among the later half's queries, which later ones change. With
    causal=True it is the block of the earlier keys in its own bucket, or of where these would be; ``hide_later`` has the
    published one, where causal=False.

    Directions and samples are buffers, drawn once and by `redraw`: ``samples`` (h, s) are shares of 2^31, moved on by the golden
    ratio from half to half. ``record`` collects "selection", the keys of the tiles of the whole or of the largest halves.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        block: b.
        num_samples: s; 0 for blocks alone.
        num_projections: directions of the hash.
        min_exact: tokens from which on (causal: beyond which) it is not exact.
        mask_own_block: no samples from a query's own block, which otherwise counts twice where it is drawn, as in the released
            float32 code; the weight m / s stays.
        border: what is missing in the last block: "masked", or "zero_keys", keys and values of zeros that take part (released).
        hide_later: the published causal form; only with causal=False, since its choice looks ahead, and without ``context``.
        generator: draws directions and samples.
        **options: those of `AttentionMixer`; ``position`` must be one of queries and keys alone.

    Raises:
        ValueError: for sizes out of range, an unknown border, or a position of another kind.

    Differs from the paper: masked tokens are sorted behind all others and take no part. Halves are counted from the front, in
    leaves of one size, so that an output does not depend on how many tokens follow; where n is ``min_exact`` times a power of 2
    they are the published ones.
    """

    samples: Tensor
    hide_later: bool = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        block: int = 256,
        num_samples: int = 256,
        num_projections: int = 7,
        min_exact: int = 4096,
        mask_own_block: bool = False,
        border: str = "masked",
        hide_later: bool = False,
        generator: torch.Generator | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        for name, value, least in (("block", block, 1), ("num_samples", num_samples, 0), ("min_exact", min_exact, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if border not in ("masked", "zero_keys"):
            raise ValueError(f"border: expected 'masked' or 'zero_keys', got {border!r}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}")
        if hide_later and self.causal:
            raise ValueError("hide_later: expected False with causal=True, whose choice does not look ahead either, got True")
        self.block, self.num_samples, self.min_exact, self.border = block, num_samples, min_exact, border
        self.mask_own_block, self.hide_later = mask_own_block, hide_later
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.hash = AngularLSH(self.head_dim, num_projections, generator=generator, **place)
        # Whole numbers, as a change of dtype would move floating-point ones.
        self.register_buffer("samples", torch.empty(num_heads, num_samples, dtype=torch.int64, device=options.get("device")))
        self.redraw(generator, directions=False)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None, *, directions: bool = True) -> None:
        """Draw samples anew, and directions."""
        if directions:
            self.hash.redraw(generator)
        device = self.samples.device if generator is None else generator.device
        self.samples.copy_(torch.randint(UNIT, self.samples.shape, generator=generator, device=device))

    @property
    def supports(self) -> Supports:
        """Two sequences have no common order."""
        return replace(self.info.supports, cross=False) if self.hide_later else self.info.supports

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Exact attention of short sequences, and the estimate of long ones."""
        n, ordered = q.shape[2], self.causal or self.hide_later
        if n < self.min_exact + ordered:
            return self._exact(q, k, v, masks)
        if ordered and masks.key is not None:
            return from_first_real(self._masked_estimate, q, k, v, masks.key)
        found = self.estimate(q, k, v, masks).output
        if ordered or masks.query is None:
            return found
        short = masks.query.sum(1) < self.min_exact
        if torch.compiler.is_compiling() or short.is_meta or bool(short.any()):  # a padded sequence is what it is alone
            found = torch.where(short.view(-1, 1, 1, 1), self._exact(q, k, v, masks), found)
        return found

    def _masked_estimate(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], v: Float[Tensor, "b hk n e"], mask: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b h n e"]:
        return self.estimate(q, k, v, Masks(mask, mask)).output

    def _exact(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Float[Tensor, "b h n e"]:
        return attention(q, k, v, causal=self.causal or self.hide_later, key_mask=masks.key)

    def estimate(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        ranks: Sequence[Int[Tensor, "b h _ s"]] | None = None,
        join: Join = merge,
    ) -> Partial:
        """Output and log-sum-exp of each query.

        Args:
            q: queries.
            k: keys.
            v: values.
            masks: of both.
            ranks: the samples among the sorted keys, for the whole, or for the smallest halves, the next larger, ...; by default
                those of ``samples``.
            join: how two parts become one.
        """
        b, group = len(q), q.shape[1] // k.shape[1]
        buckets = self.hash(q), self.hash(k).repeat_interleave(group, dim=1)
        real = [
            torch.ones(b, x.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask
            for x, mask in ((q, masks.query), (k, masks.key))
        ]
        if not (self.causal or self.hide_later):
            start = torch.zeros(1, dtype=torch.int64, device=q.device)
            sides = [Side(x.unsqueeze(2), there.unsqueeze(1), start) for x, there in zip(buckets, real, strict=True)]
            return self._part(q, k, v, sides[0], sides[1], None if ranks is None else ranks[0], join)
        found = causal_leaves(q, k, v, self.min_exact, masks.key)
        size, level = self.min_exact, 0
        while size < q.shape[2]:
            pairs = -(-(q.shape[2] - size) // (2 * size))
            start = 2 * size * torch.arange(pairs, device=q.device)
            early, late = (
                Side(_half(x, pairs, size, which), _half(there, pairs, size, which), start + which * size)
                for which, (x, there) in ((0, (buckets[1], real[1])), (1, (buckets[0], real[0])))
            )
            found = join(found, self._part(q, k, v, late, early, None if ranks is None else ranks[level], join))
            size, level = 2 * size, level + 1
        return found

    def _part(self, q: Tensor, k: Tensor, v: Tensor, queries: Side, keys: Side, ranks: Tensor | None, join: Join) -> Partial:
        """Attention of these queries to these keys, block by block and by samples."""
        number = keys.real.sum(-1).unsqueeze(1)
        if ranks is None:
            moved = (self.samples.unsqueeze(1) + (queries.start * STEP).unsqueeze(-1)) % UNIT
            ranks = moved * number.unsqueeze(-1) // UNIT
        tiles = hyper_tiles(
            queries,
            keys,
            ranks,
            block=self.block,
            num_buckets=self.hash.num_buckets,
            by_rank=not self.causal,
            mask_own_block=self.mask_own_block,
        )
        self.emit("selection", tiles.keys)
        self.emit("selected_queries", tiles.queries)
        outside = "masked" if self.border == "masked" else "zero"
        found = tile_attention(q, k, v, tiles.queries, tiles.keys, outside=outside)
        if self.num_samples:
            far = tile_attention(q, k, v, tiles.queries, tiles.samples)
            weight = (number.clamp(min=1).to(far.lse.dtype) / ranks.shape[-1]).log()
            weight = weight.expand(*q.shape[:2], -1).gather(2, tiles.problem).unsqueeze(-1)
            near, far = (
                Partial(part.output.flatten(2, 3), (part.lse + shift).flatten(2, 3))
                for part, shift in ((found, 0.0), (far, weight))
            )
            both = join(near, far)
            found = Partial(both.output.view_as(found.output), both.lse.view_as(found.lse))
        return to_tokens(found, tiles.queries, q.shape[2])


def _half(x: Shaped[Tensor, "*s n"], pairs: int, size: int, which: int) -> Shaped[Tensor, "*s p size"]:
    """The earlier (0) or later (1) halves of the first pairs, zeros (False) beyond the end."""
    length = 2 * pairs * size
    return F.pad(x, (0, max(0, length - x.shape[-1])))[..., :length].unflatten(-1, (pairs, 2, size))[..., which, :]
