"""Routed feed-forward: each token runs through some contiguous blocks of the hidden units."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.channel_mixers.contract import ChannelMixer
from attnlab.channel_mixers.registry import channel_mixers
from attnlab.core.grid import Grid
from attnlab.mixers.parts.routing import top_k_mask

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


@channel_mixers.register("routed_mlp", paper="spt")
class RoutedMLP(ChannelMixer):
    r"""A perceptron of which each token uses k out of G blocks of hidden units (Wang et al. 2023, SPT, arXiv 2312.10365).

    With the rows $W_1^g$ and columns $W_2^g$ of block g and the set S(x) of the k largest of $W_r x + c$,

    $$y = \sum_{g \in S(x)} W_2^g\, \sigma(W_1^g x + b_1^g) + b_2$$

    or, ``gated``, $\sum_{g \in S(x)} W_2^g\, (\sigma(W_1^g x) \odot W_3^g x)$. With k = G it is the perceptron. The choice is
    hard and outputs are not weighted by it: the router has no gradient. A block takes its own tokens alone, time O(n k / G) of
    the perceptron's; under compilation all units are computed, and those that are off set to 0.

    Args:
        dim: width of the tokens.
        hidden: inner width, a multiple of ``num_blocks``; by default 4 dim.
        num_blocks: G.
        num_active: k; by default half of the blocks, or a quarter where gated.
        gated: whether a second projection opens the hidden units (LLaMA) or there is none (OPT).
        activation: $\sigma$: "relu", "silu" or "gelu"; by default "silu" where gated and "relu" else.
        bias: whether the layers have one; by default where not gated.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for counts that do not fit, or an unknown activation.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        num_blocks: int = 4,
        num_active: int | None = None,
        gated: bool = False,
        activation: str | None = None,
        bias: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, 4 * dim if hidden is None else hidden)
        if num_blocks < 1 or self.hidden % num_blocks:
            raise ValueError(f"num_blocks: expected a divisor of hidden={self.hidden}, got {num_blocks}")
        num_active = max(1, num_blocks // (4 if gated else 2)) if num_active is None else num_active
        if not 1 <= num_active <= num_blocks:
            raise ValueError(f"num_active: expected 1 to num_blocks={num_blocks}, got {num_active}")
        activation = ("silu" if gated else "relu") if activation is None else activation
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
        bias = not gated if bias is None else bias
        self.num_blocks, self.num_active, self.activation = num_blocks, num_active, activation
        self.up = nn.Linear(dim, self.hidden, bias=bias, device=device, dtype=dtype)
        self.side = nn.Linear(dim, self.hidden, bias=bias, device=device, dtype=dtype) if gated else None
        self.down = nn.Linear(self.hidden, dim, bias=bias, device=device, dtype=dtype)
        self.router = nn.Linear(dim, num_blocks, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "b n c"]:
        """Each token through its blocks; ``mask`` and ``grid`` make no difference."""
        with torch.no_grad():
            on = top_k_mask(self.router(x), self.num_active)
        if torch.compiler.is_compiling() or x.is_meta or self.num_active == self.num_blocks:
            units = self._units(x, slice(None)).unflatten(-1, (self.num_blocks, -1))
            return self.down((units * on.unsqueeze(-1).to(units.dtype)).flatten(-2))
        tokens, width = x.flatten(0, 1), self.hidden // self.num_blocks
        total = torch.zeros_like(tokens)
        for block, chosen in enumerate(on.flatten(0, 1).unbind(-1)):
            part, index = slice(block * width, (block + 1) * width), chosen.nonzero().squeeze(-1)
            y = F.linear(self._units(tokens[index], part), self.down.weight[:, part])
            total = total.index_add(0, index, y.to(total.dtype))
        return (total if self.down.bias is None else total + self.down.bias.to(total.dtype)).view_as(x)

    def _units(self, x: Float[Tensor, "*s c"], part: slice) -> Float[Tensor, "*s u"]:
        """Some of the hidden units."""
        units = ACTIVATIONS[self.activation](self._linear(self.up, x, part))
        return units if self.side is None else units * self._linear(self.side, x, part)

    @staticmethod
    def _linear(layer: nn.Linear, x: Tensor, part: slice) -> Tensor:
        return F.linear(x, layer.weight[part], None if layer.bias is None else layer.bias[part])
