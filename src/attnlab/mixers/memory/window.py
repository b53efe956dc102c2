"""Causal window attention over the real tokens of a stream, with a few keys that are always seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.state import State
from attnlab.mixers.memory.real_tokens import align, recent
from attnlab.ops.sliding_window import sliding_window_attention


class Cache(NamedTuple):
    """Keys and values (b, m, c) of the last tokens, and which of these there are; None: all."""

    k: Float[Tensor, "b m c"]
    v: Float[Tensor, "b m c"]
    real: Bool[Tensor, "b m"] | None

    def pack(self) -> dict[str, Tensor]:
        """As tensors of a state."""
        real = self.k.new_ones(self.k.shape[:2], dtype=torch.bool) if self.real is None else self.real
        return {"window_keys": self.k, "window_values": self.v, "window_real": real}

    @classmethod
    def unpack(cls, state: State) -> Cache:
        """The inverse of `pack`."""
        return cls(state["window_keys"], state["window_values"], state["window_real"])


class WindowAttention(nn.Module):
    r"""$o_i = \sum_{j \in N(i)} \mathrm{softmax}_j(d^{-1/2} q_i^\top k_j)\, v_j$, over the last w real tokens and a prefix.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        window: w, its own token among them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.window = num_heads, window
        self.q_proj = nn.Linear(dim, dim, bias=False, **place)
        self.k_proj = nn.Linear(dim, dim, bias=False, **place)
        self.v_proj = nn.Linear(dim, dim, bias=False, **place)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Cache:
        """No keys: room for w - 1 of them."""
        empty = torch.zeros(batch_size, self.window - 1, self.k_proj.out_features, device=device, dtype=dtype)
        return Cache(empty, empty.clone(), torch.zeros(empty.shape[:2], device=device, dtype=torch.bool))

    def keep(self, tokens: Float[Tensor, "b n c"]) -> Cache:
        """The keys and values of the last w - 1 of ``tokens``, and no room for others."""
        tokens = tokens[:, max(tokens.shape[1] - self.window + 1, 0) :]
        return Cache(self.k_proj(tokens), self.v_proj(tokens), None)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        cache: Cache,
        mask: Bool[Tensor, "b n"] | None,
        prefix: Float[Tensor, "p c"] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Cache]:
        """The heads side by side, without an output projection, and the keys for the tokens after these.

        Args:
            x: tokens, zero where masked.
            cache: keys and values of the tokens before.
            mask: True marks a real token; the others take no place in a window.
            prefix: tokens that every query sees.
        """
        b, n, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        aligned, past = align(mask), cache.k.shape[1]
        if aligned is not None:
            q, k, v = (aligned.spread(t[:, None])[:, 0] for t in (q, k, v))
        live = None if aligned is None else aligned.live
        sinks = x.new_zeros(0, x.shape[2]) if prefix is None else prefix
        keys = torch.cat((self.k_proj(sinks).expand(b, -1, -1), cache.k, k), 1)
        values = torch.cat((self.v_proj(sinks).expand(b, -1, -1), cache.v, v), 1)
        real = None
        if live is not None or cache.real is not None:
            ones = torch.ones(b, len(sinks) + past + n, dtype=torch.bool, device=x.device)
            first, before, new = ones.split((len(sinks), past, n), 1)
            before, new = before if cache.real is None else cache.real, new if live is None else live
            real = torch.cat((first, before, new), 1)
        heads = (rearrange(t, "b n (h d) -> b h n d", h=self.num_heads) for t in (q, keys, values))
        y = sliding_window_attention(*heads, left=self.window - 1, num_sinks=len(sinks), key_mask=real)
        if aligned is not None:
            y = aligned.collect(y)
        return rearrange(y, "b h n d -> b n (h d)"), self._next(cache, k, v, live, n if aligned is None else aligned.count)

    @staticmethod
    def _next(cache: Cache, k: Tensor, v: Tensor, live: Tensor | None, count: Tensor | int) -> Cache:
        after = (recent(cache.k, k, count), recent(cache.v, v, count))
        if cache.real is None:
            return Cache(*after, None)
        new = cache.real.new_ones(k.shape[:2]) if live is None else live
        return Cache(*after, recent(cache.real[..., None], new[..., None], count)[..., 0])
