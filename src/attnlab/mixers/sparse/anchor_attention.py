"""Anchor attention: single columns of keys, chosen by how far they are below the largest near score."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.tilings import segments_of
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.first_real import from_first_real
from attnlab.mixers.parts.selection import chosen_places
from attnlab.mixers.sparse.leaves import causal_leaves
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision
from attnlab.ops.partials import Partial, merge
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention


class Anchors(NamedTuple):
    """What each block of queries is judged by: mean query, mean anchor, and whether it has any real query."""

    queries: Float[Tensor, "b h t s d"]
    scores: Float[Tensor, "b h t s"]
    real: Bool[Tensor, "b t s"]


@mixers.register(
    "anchor_attention",
    family="sparse",
    paper="anchor-attention",
    supports=Supports(causal="optional", mixing_matrix=True, discontinuous=True, cost=2.0),
    example={"block": 1, "step": 2, "theta": 0.3},
)
class AnchorAttention(AttentionMixer):
    r"""Attention to the first keys, to near ones, and to columns that come close to their largest score (2025, arXiv 2505.23520).

    The sequence is cut into groups of ``step`` blocks of b tokens. A(i) are the first ``init_blocks`` b keys and the near ones:
    those of the group of i and of ``local_groups`` - 1 groups on both sides. With $s_{ij} = d^{-1/2} q_i^\top k_j$,
    $a_i = \max_{j \in A(i)} s_{ij}$, and means $\bar q_u, \bar a_u$ over the queries of block u,

    $$C(g) = \{j : \max_{u \in U(g)} (d^{-1/2}\, \bar q_u^\top k_j - \bar a_u) \ge -\theta\}, \qquad
      o_i = \sum_j \mathrm{softmax}_{j \in A(i) \cup C(g(i))}(s_{ij})\, v_j ,$$

    with j outside of the first and the near keys. No gradient passes the choice. A large $\theta$ is dense attention, $-\infty$
    attention to first and near keys. Time O(n^2 d / b + p d) for p pairs; memory O(n^2 / (step b) + n d).

    The published form is ``hide_later``: in all of this no query uses a later key. But U(g) are the blocks of the group itself,
    so that a query's columns depend on later queries of its group, as it is made for prompts that are there as a whole; so it is
    an option of causal=False. With causal=True U(g) are the blocks of the group before.

    ``record`` collects "selection" (b, h, groups, n), the columns outside of the near keys.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        block: b.
        step: blocks of a group.
        theta: $\theta$, in units of the (natural) scores.
        init_blocks: blocks of first keys; 0 for none.
        local_groups: groups of near keys to one side, the query's own included.
        hide_later: no query uses a later key; only with causal=False, since the choice looks ahead.
        **options: those of `AttentionMixer`; ``position`` must be one of queries and keys alone.

    Raises:
        ValueError: for sizes out of range, a position of another kind, or ``hide_later`` where causal.

    Differs from the paper: keys count once, and all between first and near ones are examined; in the released kernels some first
    keys enter the softmax twice, and the last block before a group is left out. n may be anything. Masked tokens are in no mean.
    The form without order, where later keys take part like earlier ones, is ours.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        block: int = 128,
        step: int = 16,
        theta: float | int = 12.0,
        init_blocks: int = 1,
        local_groups: int = 1,
        hide_later: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        least = {"block": (block, 1), "step": (step, 1), "init_blocks": (init_blocks, 0), "local_groups": (local_groups, 1)}
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {value}")
        if theta != theta:
            raise ValueError(f"theta: expected a number, got {theta}")
        if hide_later and self.causal:
            raise ValueError("hide_later: expected False with causal=True, whose choice does not look ahead either, got True")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}")
        self.block, self.step, self.theta = block, step, float(theta)
        self.ordered = hide_later or self.causal
        self.first, self.before = init_blocks * block, (local_groups - 1) * block * step
        self.after = 0 if self.ordered else self.before

    @property
    def group(self) -> int:
        """Tokens of a group."""
        return self.block * self.step

    @property
    def near(self) -> int:
        """Near keys of a group."""
        return self.before + self.group + self.after

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over first, near and chosen keys, counted from the first real one."""
        if masks.key is None:
            return self._attend(q, k, v, None)
        return from_first_real(self._attend, q, k, v, masks.key)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Float[Tensor, "b h n e"]:
        chosen = self.choose(q, k, mask)
        self.emit("selection", chosen)
        n = q.shape[2]
        queries = segments_of(n, self.group).to(q.device)
        if torch.compiler.is_compiling() or q.is_meta:  # which need lengths that do not depend on data
            places = torch.arange(n, device=q.device).expand_as(chosen).masked_fill(~chosen, -1)
        else:
            places = chosen_places(chosen)
        inverse = places_of(queries, n)
        far = _in_order(tile_attention(q, k, v, queries[None, None], places, key_mask=mask), inverse)
        if self.ordered and not self.before:
            return merge(far, causal_leaves(q, k, v, self.group, mask)).output
        keys = self._near(n, q.device)[None, None]
        near = tile_attention(q, k, v, queries[None, None], keys, causal=self.ordered, key_mask=mask)
        return merge(far, _in_order(near, inverse)).output

    def _near(self, n: int, device: torch.device) -> Int[Tensor, "t y"]:
        """The near keys of each group."""
        groups = -(-n // self.group)
        return segments_of(n, self.near, step=self.group, start=-self.before)[:groups].to(device)

    @torch.no_grad()
    @full_precision
    def choose(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], mask: Bool[Tensor, "b n"] | None
    ) -> Bool[Tensor, "b h t n"]:
        """The columns of each group outside of its near keys: first keys and stripes."""
        wide, n = accumulate_dtype(q.dtype), q.shape[2]
        real = torch.ones(len(q), n, dtype=torch.bool, device=q.device) if mask is None else mask
        q, k = q.to(wide) * q.shape[3] ** -0.5, k.to(wide)
        anchors = self.anchors(q, k, real, masked=mask is not None)
        place, groups = torch.arange(n, device=q.device), torch.arange(-(-n // self.group), device=q.device)
        start = (groups * self.group).unsqueeze(1)
        outside = place < start - self.before
        if not self.ordered:
            outside = outside | (place >= start + self.group + self.after)
        kept = (place < self.first).expand(*q.shape[:2], len(groups), n)
        per_key = q.shape[1] // k.shape[1]
        for pooled, score, some in zip(*(x.unbind(3 if x.ndim > 3 else 2) for x in anchors), strict=True):
            if self.causal:
                pooled, score = (F.pad(x, pad)[:, :, :-1] for x, pad in ((pooled, (0, 0, 1, 0)), (score, (1, 0))))
                some = F.pad(some, (1, 0))[:, :-1]
            products = (pooled.unflatten(1, (-1, per_key)) @ k.unsqueeze(2).mT).flatten(1, 2)
            close = products + self.theta >= score.unsqueeze(-1)
            kept = kept | (close & some[:, None, :, None])
        return kept & outside & real[:, None, None]

    def anchors(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], real: Bool[Tensor, "b n"], *, masked: bool = True
    ) -> Anchors:
        """The means of each block's queries, which are scaled, and of their largest scores; unless ``masked`` all are real."""
        n, per_key = q.shape[2], q.shape[1] // k.shape[1]
        groups = -(-n // self.group)
        more = groups * self.group - n
        around = (self.before, more + self.after)
        tokens = F.pad(q, (0, 0, 0, more)).unflatten(2, (groups, self.step, self.block))
        present = F.pad(real, (0, more)).unflatten(1, (groups, self.step, self.block))
        place = torch.arange(groups * self.group, device=q.device).view(groups, self.step, self.block)
        near_keys = F.pad(k, (0, 0, *around)).unfold(2, self.near, self.group)
        near_real = F.pad(real, around).unfold(1, self.near, self.group)
        later_in_block = torch.ones(self.block, self.block, dtype=torch.bool, device=q.device).triu_(1)
        # else a key that is none stands behind every query of its group, and is one of the later ones
        hides = masked or not self.ordered or self.before > 0
        first = min(self.first, n)
        largest = []
        for u in range(self.step):
            rows = tokens[:, :, :, u].unflatten(1, (-1, per_key))
            end = self.before + (u + 1) * self.block if self.ordered else self.near
            scores = rows @ near_keys[:, :, None, :, :, :end]
            if self.ordered:  # of the keys up to the block's end, those of the block itself can be later ones
                scores[..., end - self.block :].masked_fill_(later_in_block, float("-inf"))
            if hides:
                scores.masked_fill_(~near_real[:, None, None, :, None, :end], float("-inf"))
            best = scores.amax(-1)
            if first:
                scores = rows @ k[:, :, None, None, :first].mT
                later = torch.arange(first, device=q.device) > place[:, u, :, None]
                hidden = ~real[:, None, None, :first] | (self.ordered & later)
                best = torch.maximum(best, scores.masked_fill(hidden[:, None, None], float("-inf")).amax(-1))
            largest.append(best.flatten(1, 2))
        number = present.sum(-1)
        count = number.clamp(min=1).to(q.dtype).unsqueeze(1)
        score = torch.stack(largest, dim=3).masked_fill(~present.unsqueeze(1), 0.0).sum(-1) / count
        pooled = tokens.masked_fill(~present[:, None, ..., None], 0.0).sum(-2) / count.unsqueeze(-1)
        return Anchors(pooled, score, number > 0)


def _in_order(part: Partial, inverse: Int[Tensor, "n"]) -> Partial:
    """What tiles hold for each token."""
    return Partial(from_tiles(part.output, inverse), part.lse.flatten(2).index_select(2, inverse))
