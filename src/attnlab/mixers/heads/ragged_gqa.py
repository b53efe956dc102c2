"""Attention with a map from query heads to key heads that need not be a fixed ratio."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import DENSE, AttentionMixer, AttentionOptions, CachedAttention
from attnlab.mixers.heads.allocation import heads_in_order


def usable_keys(masks: Masks, k: Float[Tensor, "b hk m d"]) -> Bool[Tensor, "b m"] | None:
    """The keys that some query may use."""
    if masks.pair is None:
        return masks.key
    paired = masks.pair.any(dim=1).any(dim=1).expand(k.shape[0], -1)
    return paired if masks.key is None else paired & masks.key


class RaggedAttention(AttentionMixer):
    """An `AttentionMixer` whose query heads read the key heads that `key_heads` says; a subclass implements that.

    Args: those of `AttentionMixer`, but for positions that add to the values.

    Raises:
        UnsupportedError: with such a position.
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        if self.position.reads_values:
            raise self._refusal(f"position={self.position_name!r}", "it adds to value heads, whose query heads vary")

    def key_heads(self, k: Float[Tensor, "b hk m d"], mask: Bool[Tensor, "b m"] | None) -> Int[Tensor, " h"]:
        """The key head that each query head reads."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement key_heads")

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the allowed keys of the key head that a query head reads."""
        # one gather: sizes that are known on the device alone cannot cut tensors without a synchronisation
        index = self.key_heads(k, usable_keys(masks, k))
        masks = masks if self.supports.pair_mask else masks._replace(pair=None)
        return self.dense(q, k[:, index], v[:, index], masks, grid)

    def show(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        heads: Float[Tensor, "b h n e"],
        masks: Masks,
        grid: Grid | None,
    ) -> None:
        """Emit "values" as the query heads read them, "mixed", "attention" and "key_heads"."""
        self.emit("values", lambda: v[:, self.key_heads(k, usable_keys(masks, k))])
        self.emit("mixed", heads)
        self.emit("attention", lambda: self.attend(q, k, self.identity(k), masks, grid))
        self.emit("key_heads", lambda: self.key_heads(k, usable_keys(masks, k)))


@mixers.register(
    "ragged_gqa",
    family="heads",
    paper="key-driven-gqa",
    supports=DENSE,
    example={"num_kv_heads": 2, "group_sizes": (3, 1)},
)
class RaggedGQA(RaggedAttention, CachedAttention):
    r"""Grouped-query attention with groups of unequal sizes, fixed (the form in which Khan et al. 2024 deal query heads).

    With $n_g$ query heads for key head g, $\sum_g n_g = H$, query head h reads key head g(h), the first $n_1$ read key head 1:

    $$o_h = \mathrm{softmax}(d^{-1/2}\, q_h k_{g(h)}^\top)\, v_{g(h)} .$$

    A key head may have no query head; it still costs its share of the cache. The state holds all keys and values of the key
    heads. Time O(n m d) a query head; the keys are gathered for all query heads where attention runs, not in the state.

    It takes the parameters of `KeyDrivenGQA` and `DynamicGQA`, which choose the sizes from the keys and so cannot be causal.

    Args:
        dim: width of the tokens.
        num_heads: H.
        group_sizes: $n_g$, one a key head; None for equal ones.
        **options: those of `AttentionMixer`, but for positions that add to the values.

    Raises:
        ValueError: for sizes that are negative, or do not sum to ``num_heads`` over ``num_kv_heads`` groups.
        UnsupportedError: with a position that adds to the values.

    Differs from the paper: there the sizes are not fixed.
    """

    index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        group_sizes: Sequence[int] | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        groups = self.num_kv_heads
        sizes = [num_heads // groups] * groups if group_sizes is None else list(group_sizes)
        if len(sizes) != groups or min(sizes) < 0 or sum(sizes) != num_heads:
            raise ValueError(f"group_sizes: expected {groups} (num_kv_heads) sizes that sum to {num_heads}, got {sizes}")
        index = heads_in_order(torch.tensor(sizes), num_heads)
        self.register_buffer("index", index.to(options.get("device")), persistent=False)

    def key_heads(self, k: Float[Tensor, "b hk m d"], mask: Bool[Tensor, "b m"] | None) -> Int[Tensor, " h"]:
        """The fixed map."""
        return self.index
