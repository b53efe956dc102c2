"""Reversed attention: every token chooses who receives its message, and a dependency tree emerges."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.ops.attention import attention_map


@mixers.register(
    "reversed",
    family="graph",
    paper="dependencyvit",
    supports=Supports(cross=True, grid=frozenset({1, 2, 3}), mixing_matrix=True, permutation_equivariant=True, cost=2.0),
)
class ReversedAttention(Mixer):
    r"""Attention normalised over receivers (Ding et al. 2023, Visual Dependency Transformers).

    Token i is a child that distributes its message over parents j. For head h of width d,

    $$A_{hij} = \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j), \qquad R_{hji} = A_{hij}\, P_{ih}\, m_i, \qquad
      y_j = W_o\,\big[\textstyle\sum_i R_{hji} v_i\big]_h$$

    with the head selector $P_i = \mathrm{softmax}_h(W_P x_i / T)$, by which a child picks the relation that it uses, and the
    message controller $m_i = m'_i\, \sigma(W_2\, \mathrm{GELU}(W_1 x_i))$, which falls from layer to layer: $m'$ is that of the
    layer below, 1 at first. What i sends adds up to $m_i$; a token that nobody addresses receives nothing. The maps are formed:
    time and memory O(n m) a head.

    ``forward`` begins with $m' = 1$; a network that carries messages over its depth calls `pass_messages`. With ``context``
    the children are there and the parents in x. ``record`` collects "messages" $m$ (b, m), "dependency_mask" $\sum_h R$
    (b, n, m), of which `dependency_tree` reads the tree, and "prune_score" (b, n), the message that each token receives: the
    least are pruned first.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always False.
        temperature: T of the head selector.
        qkv_bias: biases in the three input projections.
        out_bias: bias in the output projection.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a temperature that is not positive.
        UnsupportedError: with ``causal=True`` (receivers compete, later ones too); for a pair mask, for the same reason.

    Differs from the paper: its authors published no code. Biases of the selector and the controller, and which score prunes, are
    those of a third party's implementation, with which recorded values agree. Weighted pooling of the output tokens and the
    pruning of tokens are the model's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        temperature: float = 0.1,
        qkv_bias: bool = False,
        out_bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if temperature <= 0.0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.temperature = temperature
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=qkv_bias, **place) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim, bias=out_bias, **place)
        self.head_selector = nn.Linear(dim, num_heads, bias=False, **place)
        self.controller_in = nn.Linear(dim, max(1, dim // 2), bias=False, **place)
        self.controller_out = nn.Linear(max(1, dim // 2), 1, bias=False, **place)

    def pass_messages(
        self,
        x: Float[Tensor, "b n c"],
        messages: Float[Tensor, "b s"] | None = None,
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        grid: Grid | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n"]]:
        """Mix the tokens of a layer within a network.

        Args:
            x: tokens, (batch, n, dim).
            messages: $m'$ of the layer below, (batch, n); None is 1 everywhere.
            mask: (batch, n), True marks a real token.
            grid: as for `forward`.

        Returns:
            What `forward` gives with these messages, and the messages for the layer above, 0 at masked tokens.

        Raises:
            ValueError: for messages of another shape, and what `forward` refuses.
        """
        self._validate(x, None, mask, None, None, grid)
        if messages is not None and messages.shape != x.shape[:2]:
            raise ValueError(f"messages: expected shape {tuple(x.shape[:2])}, got {tuple(messages.shape)}")
        x = zero_masked(x, mask)
        y, after = self._send(x, x, Masks(mask, mask), messages)
        return zero_masked(y, mask), after if mask is None else after.masked_fill(~mask, 0.0)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """A layer without messages from below."""
        return self._send(x, x if context is None else context, masks, None)[0]

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The reversed map, a row a receiver."""
        children = x if context is None else context
        return self._reversed(x, children, masks, self._messages(children, None))

    def _send(
        self, x: Float[Tensor, "b n c"], children: Float[Tensor, "b m c"], masks: Masks, before: Float[Tensor, "b m"] | None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b m"]]:
        messages = self._messages(children, before)
        weights = self._reversed(x, children, masks, messages)
        v = self._heads(self.v_proj(children))
        mixed = weights @ v
        self.emit("values", v)
        self.emit("mixed", mixed)
        self.emit("attention", weights)
        self.emit("messages", messages)
        self.emit("dependency_mask", lambda: weights.sum(dim=1))
        self.emit("prune_score", lambda: weights.sum(dim=(1, 3)))
        return self.out_proj(rearrange(mixed, "b h n d -> b n (h d)")), messages

    def _messages(self, children: Float[Tensor, "b m c"], before: Float[Tensor, "b m"] | None) -> Float[Tensor, "b m"]:
        gate = self.controller_out(F.gelu(self.controller_in(children))).squeeze(-1).sigmoid()
        return gate if before is None else before * gate

    def _reversed(
        self, x: Float[Tensor, "b n c"], children: Float[Tensor, "b m c"], masks: Masks, messages: Float[Tensor, "b m"]
    ) -> Float[Tensor, "b h n m"]:
        q, k = self._heads(self.q_proj(children)), self._heads(self.k_proj(x))
        forward = attention_map(q, k, key_mask=masks.query)  # the receivers compete: they are the keys of this map
        chosen = torch.softmax(self.head_selector(children) / self.temperature, dim=-1) * messages.unsqueeze(-1)
        if masks.key is not None:
            chosen = zero_masked(chosen, masks.key)
        return forward.mT * chosen.transpose(1, 2).unsqueeze(2)

    def _heads(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)


def dependency_tree(dependency_mask: Float[Tensor, "b n n"], *, mask: Bool[Tensor, "b n"] | None = None) -> Int[Tensor, "b n"]:
    r"""The parent of every token, $\arg\max_j D_{ji}$: who receives most of its message.

    Args:
        dependency_mask: D, as `ReversedAttention` records it: a row a receiver, a column a sender.
        mask: (b, n), True marks a real token.

    Returns:
        Indices (b, n). A token that keeps its message is its own parent: a root. Masked tokens have -1, and are nobody's parent.
    """
    if mask is None:
        return dependency_mask.argmax(dim=1)
    held = dependency_mask.masked_fill(~mask.unsqueeze(-1), float("-inf"))
    return held.argmax(dim=1).masked_fill(~mask, -1)
