"""What adapters on the graph of an attention map share: attention, its map, and an update that reads both."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.graph.map_attention import MapAttention
from attnlab.ops.attention import attention_map


class GraphAdapter(MapAttention):
    r"""Softmax attention $y = W_o A V$ plus an update from message passing on the graph $A$; a subclass implements `update`.

    The mixing matrix is A; the update is outside of it. The map is formed: memory O(n m) a head.

    Args:
        dim: width of the tokens.
        num_heads: heads, of keys and values too.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for grouped heads.
    """

    def form_map(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], masks: Masks, grid: Grid | None
    ) -> Float[Tensor, "b h n m"]:
        """The softmax map."""
        bias = self.position.bias(q, k.shape[2], causal=self.causal, grid=grid)
        factor = self.position.factor(q, k.shape[2], causal=self.causal, grid=grid)
        return attention_map(q, k, bias=bias, factor=factor, causal=self.causal, key_mask=masks.key, pair_mask=masks.pair)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Attention, and the update."""
        q, k, v = self.project(x, context, self.place(x, masks.query))
        graph = self.form_map(q, k, masks, grid)
        heads = graph @ v
        self.emit("values", v)
        self.emit("mixed", heads)
        self.emit("attention", graph)
        y = self.join(self._with_local(heads, v, grid, masks.key), x, masks.query)
        return y + self.update(x, y, graph, q, v, masks)

    def update(
        self,
        x: Float[Tensor, "b n c"],
        y: Float[Tensor, "b n c"],
        graph: Float[Tensor, "b h n m"],
        q: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h m d"],
        masks: Masks,
    ) -> Float[Tensor, "b n c"]:
        """What is added to the attention's output ``y``."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement update")

    def freeze_attention(self) -> None:
        """Stop the gradient of everything but the adapter, for fine-tuning a trained attention."""
        for part in (self.q_proj, self.k_proj, self.v_proj, self.out_proj, self.q_norm, self.k_norm, self.position):
            part.requires_grad_(False)
