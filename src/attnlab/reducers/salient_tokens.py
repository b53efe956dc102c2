"""Salient tokens: those to which the class token's attention goes back, as queries of a later attention."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.tokens import Tokens
from attnlab.reducers.contract import Reducer
from attnlab.reducers.registry import reducers


@reducers.register("salient_tokens", family="pruning", paper="dcal")
class SalientTokens(Reducer):
    r"""Keeps the prefix and the share R of the other tokens with the largest weight in the class token's row (Zhu et al. 2022).

    The row is that of token 0 in a map (b, n, n) that ``tokens.streams`` carries, without the prefix's columns: in the paper the
    rollout of all layers so far (`attnlab.ops.maps.rollout`). Of r real tokens $\lceil R r \rceil$ are kept, at least one, in
    their old order; of equal weights the first. Time O(n log n).

    Global-local cross-attention is a mixer with the kept tokens as ``x`` and all tokens as ``context``::

        with attnlab.record(model, only=["attention"]) as tape:
            x = model(image)
        maps = rollout(list(tape.matching("attention").values()))
        everything = Tokens(x, num_prefix=1, streams={"rollout": maps})
        salient = create_reducer("salient_tokens", dim)(everything)
        y = create_mixer("softmax", dim, heads)(salient.x, everything.x, mask=salient.mask, context_mask=everything.mask)

    with a residual to ``salient.x`` and an MLP behind it. The choice has no gradient. The output stands for no grid: grid and
    source are dropped. ``record`` collects "selected" (b, n), True at tokens that stay.

    Args:
        dim: width of the tokens.
        ratio: R; the authors keep 0.1 for fine-grained classes and 0.3 to recognise individuals again.
        stream: name of the map.

    Raises:
        ValueError: for a ratio outside (0, 1], tokens without a prefix or other tokens, or without such a map.

    Differs from the paper: the share counts real tokens and is rounded up.
    """

    def __init__(self, dim: int, *, ratio: float | int = 0.1, stream: str = "rollout") -> None:
        super().__init__(dim)
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio: expected above 0 and at most 1, got {ratio}")
        self.ratio, self.stream = ratio, stream

    def reduce(self, tokens: Tokens) -> Tokens:
        """The prefix and the salient tokens."""
        batch, n = tokens.x.shape[:2]
        prefix = tokens.num_prefix
        if not 1 <= prefix < n:
            raise ValueError(f"tokens: expected a class token and others, got num_prefix={prefix} of {n} tokens")
        if self.stream not in tokens.streams:
            raise ValueError(f"tokens.streams: expected {self.stream!r}, got {sorted(tokens.streams)}")
        maps = tokens.streams[self.stream]
        if tuple(maps.shape) != (batch, n, n):
            raise ValueError(f"tokens.streams[{self.stream!r}]: expected shape {(batch, n, n)}, got {tuple(maps.shape)}")
        real = tokens.x.new_ones(batch, n, dtype=torch.bool) if tokens.mask is None else tokens.mask
        selected = self._select(maps[:, 0, prefix:].detach(), real[:, prefix:])
        selected = torch.cat((torch.ones_like(real[:, :prefix]), selected), dim=1)
        self.emit("selected", selected & real)
        kept = prefix + self._count(n - prefix)
        # chosen tokens first, each in its old order; an example with fewer than others has masked ones behind
        order = (~selected).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
        there = (selected & real).gather(1, order)
        x = tokens.x.gather(1, order.unsqueeze(-1).expand(-1, -1, self.dim))
        sizes = None if tokens.sizes is None else tokens.sizes.gather(1, order)
        return replace(
            tokens, x=x, mask=None if tokens.mask is None else there, grid=None, sizes=sizes, source=None, cu_seqlens=None
        )

    def _select(self, weights: Float[Tensor, "b p"], real: Bool[Tensor, "b p"]) -> Bool[Tensor, "b p"]:
        """The largest share of the real ones."""
        counts = torch.tensor([self._count(p) for p in range(real.shape[1] + 1)], device=real.device)[real.sum(dim=1)]
        order = weights.masked_fill(~real, float("-inf")).argsort(dim=1, descending=True, stable=True)
        first = torch.arange(real.shape[1], device=real.device) < counts[:, None]
        return torch.zeros_like(real).scatter(1, order, first) & real

    def _count(self, of: int) -> int:
        # 0.1 * 10 is not exactly 1 and must not be rounded up to 2
        return min(of, max(1, math.ceil(self.ratio * of - 1e-9)))
