"""Dynamic grouped queries: groups follow how the norms of the key heads change while the model trains."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.heads.allocation import heads_in_order, key_norms, rounded_shares, settle_by_draws
from attnlab.mixers.heads.key_driven_gqa import KEY_DRIVEN, halved
from attnlab.mixers.heads.ragged_gqa import RaggedAttention

_EMA = 0.9


@mixers.register("dynamic_gqa", family="heads", paper="key-driven-gqa", supports=KEY_DRIVEN)
class DynamicGQA(RaggedAttention):
    r"""Grouped-query attention whose groups follow the key heads' norms over training steps (Khan et al. 2024, DGQA).

    With the norms $m_g = \sum_b \lVert K_{bg} \rVert_F$ of a batch and a stored statistic c, 0 at first,

    $$w = |c - m| \;\text{(diff)} \quad\text{or}\quad w = 0.9\, m + 0.1\, c \;\text{(ema)}, \qquad
      n_g = \mathrm{round}\Big(H \frac{w_g}{\sum w}\Big)$$

    query heads read key head g, dealt contiguously; while $\sum n_g$ misses H, a key head drawn at random gains or loses one,
    an empty one loses none. In training the sizes are found anew at every ``window_size``-th step, and then
    $c \leftarrow (c + m) / \text{window\_size}$. In evaluation they are found in every pass, c stays. Masked tokens do not count
    in the norms, which are constants for autograd. Time and memory are those of softmax attention. ``record`` collects
    "key_heads" (h,) and "key_norms" (hk,).

    Buffers: ``statistic`` c (hk,), ``step`` (training steps so far), ``group_sizes`` (hk,), ``last_norms`` (hk,) and
    ``tiebreak`` (4 hk,), the key heads drawn for the last repair in the order in which they are tried. They are saved, and
    evaluation uses the saved ``tiebreak``. By definition the groups of an example depend on the others in its batch, and on
    all keys: there is no causal form and no state.

    Args:
        dim: width of the tokens.
        num_heads: H.
        kind: "diff" or "ema".
        window_size: training steps between two allocations; the authors train with 300.
        generator: source of the repair's draws.
        **options: those of `AttentionMixer`; ``num_kv_heads`` is half of ``num_heads`` by default.

    Raises:
        ValueError: for an unknown kind, or a window below 1.
        UnsupportedError: with ``causal=True``, or a position that adds to the values.

    Differs from the paper: the authors' evaluation also sets c to m, so that a second pass over the same batch gives other
    groups; here evaluation changes nothing. A training batch that comes twice in a row counts as one step, so that gradient
    checkpointing finds the groups of the first pass. Weights that are all 0 give equal groups. Draws that are used up leave the
    rest to the largest and smallest groups.
    """

    statistic: Tensor
    step: Tensor
    group_sizes: Tensor
    last_norms: Tensor
    tiebreak: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        kind: str = "diff",
        window_size: int = 1,
        generator: torch.Generator | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **halved(num_heads, options))
        if kind not in ("diff", "ema"):
            raise ValueError(f"kind: expected 'diff' or 'ema', got {kind!r}")
        if window_size < 1:
            raise ValueError(f"window_size: expected at least 1, got {window_size}")
        self.kind, self.window_size, self.generator = kind, window_size, generator
        groups, device = self.num_kv_heads, options.get("device")
        self.register_buffer("statistic", torch.zeros(groups, device=device))
        self.register_buffer("last_norms", torch.full((groups,), -1.0, device=device))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("group_sizes", torch.full((groups,), num_heads // groups, device=device))
        self.register_buffer("tiebreak", torch.arange(4 * groups, device=device) % groups)

    def key_heads(self, k: Float[Tensor, "b hk m d"], mask: Bool[Tensor, "b m"] | None) -> Int[Tensor, " h"]:
        """In training those of the current step, in evaluation dealt by these keys; nothing is changed."""
        sizes = self.group_sizes if self.training else self._sizes(key_norms(k, mask))
        return heads_in_order(sizes, self.num_heads)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """In training a step of the statistic, then attention."""
        q, k, v = self.project(x, context, self.place(x, masks.query))
        self.emit("key_norms", lambda: key_norms(k, masks.key))
        if self.training:
            self._advance(key_norms(k, masks.key))
        heads = self.attend(q, k, v, masks, grid)
        self.show(q, k, v, heads, masks, grid)
        return self.join(heads, x, masks.query)

    def _sizes(self, norms: Float[Tensor, " hk"]) -> Int[Tensor, " hk"]:
        stored = self.statistic.to(norms.dtype)
        weights = (stored - norms).abs() if self.kind == "diff" else _EMA * norms + (1 - _EMA) * stored
        return settle_by_draws(rounded_shares(weights, self.num_heads), self.num_heads, self.tiebreak)

    @torch.no_grad()
    def _advance(self, norms: Float[Tensor, " hk"]) -> None:
        """One training step; nothing if the norms are those of the last one. No branch, so that it can be compiled."""
        seen = norms.to(self.last_norms.dtype)
        again = (seen == self.last_norms).all()
        due = ~again & (self.step % self.window_size == 0)
        shape, device = self.tiebreak.shape, self.tiebreak.device
        source = None if self.generator is None else self.generator.device
        drawn = torch.randint(self.num_kv_heads, shape, generator=self.generator, device=source or device).to(device)
        self.tiebreak.copy_(torch.where(due, drawn, self.tiebreak))
        self.group_sizes.copy_(torch.where(due, self._sizes(norms), self.group_sizes))
        self.statistic.copy_(torch.where(due, (self.statistic + seen) / self.window_size, self.statistic))
        self.step.add_(~again)
        self.last_norms.copy_(seen)
