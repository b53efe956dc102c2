"""Long-query attention: the query is made of the mean of the last tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.mixers.attention import DENSE, AttentionOptions, CachedAttention

# No pair_mask: a query reads the tokens before it, whether it may use them as keys or not.
LONG_QUERY = replace(DENSE, cross=False, pair_mask=False, permutation_equivariant=False, grid=frozenset({1}))


@mixers.register("long_query", family="dense", paper="mqsa-ted", supports=LONG_QUERY, example={"window": 3})
class LongQueryAttention(CachedAttention):
    r"""Softmax attention whose queries come from the mean of the last L tokens (Zhu et al. 2023, MQSA's L-query branch).

    With $r_t$ = 1 at real tokens, else 0,

    $$u_t = \frac{\sum_{l=0}^{L-1} r_{t-l}\, x_{t-l}}{\max(1, \sum_{l=0}^{L-1} r_{t-l})}, \quad n_t = \mathrm{LN}(u_t), \qquad
      y_t = n_t + \sum_j \mathrm{softmax}_j\big(d^{-1/2}\, (W_q n_t)^\top W_k x_j\big)\, W_v x_j$$

    a head, keys and values from x as it is. The mean looks back alone; ``causal=True``, as published, makes the attention do so
    too. With L = 1 this is the short-query branch. Time O(n^2 d), memory O(n d). The state holds all keys and values and
    the last L - 1 inputs.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        window: L.
        residual: add $n_t$, the normalised source of the query; a block's own residual is then one too many.
        project_out: an output projection, which the paper has not; without it heads must add up to ``dim``.
        norm_eps: of LN.
        **options: those of `AttentionMixer`; biases of the input projections by default.

    Raises:
        ValueError: for a window below 1, or heads that do not add up to ``dim`` without ``project_out``.

    Differs from the paper: no dropout. The feed-forward part, LN and residual behind the attention are the block's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window: int = 3,
        residual: bool = True,
        project_out: bool = False,
        norm_eps: float = 1e-8,
        **options: Unpack[AttentionOptions],
    ) -> None:
        given: AttentionOptions = {"qkv_bias": True, **options}
        super().__init__(dim, num_heads, **given)
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        if not project_out and num_heads * self.head_dim != dim:
            raise ValueError(f"head_dim: expected {dim // num_heads} with project_out=False, got {self.head_dim}")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.window, self.residual = window, residual
        self.query_norm = nn.LayerNorm(dim, eps=norm_eps, **place)
        if not project_out:
            self.out_proj = nn.Identity()  # type: ignore[assignment]

    def project(
        self, x: Float[Tensor, "b n c"], context: Tensor | None = None, index: Int[Tensor, "#b n"] | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hk m d"], Float[Tensor, "b hk m d"]]:
        """Queries, keys and values of tokens that have their query source beside them, (b, n, 2 dim)."""
        tokens, source = x.chunk(2, dim=-1)
        index = torch.arange(x.shape[1], device=x.device)[None] if index is None else index
        q = self.q_norm(rearrange(self.q_proj(source), "b n (h d) -> b h n d", h=self.num_heads))
        k = self.k_norm(rearrange(self.k_proj(tokens), "b m (h d) -> b h m d", h=self.num_kv_heads))
        v = rearrange(self.v_proj(tokens), "b m (h d) -> b h m d", h=self.num_kv_heads)
        return self.position.encode(q, index), self.position.encode(k, index), v

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the allowed keys; a mask of pairs, which queries do not heed, is none here either."""
        return self.dense(q, k, v, masks._replace(pair=None), grid)

    def join(
        self, heads: Float[Tensor, "b h n e"], x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n c"]:
        """Heads back to tokens; the source of the query stays beside them, for as wide an output as input."""
        y, source = self.out_proj(rearrange(heads, "b h n e -> b n (h e)")), x.chunk(2, dim=-1)[1]
        return torch.cat((y + source if self.residual else y, source), dim=-1)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Average, then attend."""
        return super().mix(self._with_source(x, masks.query), context, masks, grid)[..., : self.dim]

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The softmax map."""
        return super().matrix(self._with_source(x, masks.query), context, masks, grid)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No keys, and no inputs before the first."""
        before = torch.zeros(batch_size, self.window - 1, self.dim, device=device, dtype=dtype)
        return State({**super().begin(batch_size, device, dtype), "inputs": before, "counted": before[..., 0]})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Average with the inputs before, then attend over all keys."""
        y, after = super().advance(self._with_source(x, mask, state), state, mask=mask)
        counted = torch.ones_like(x[..., 0]) if mask is None else mask.to(x.dtype)
        kept = x.shape[1]  # the last L - 1 of the inputs before and these
        inputs, counts = torch.cat((state["inputs"], x), dim=1)[:, kept:], torch.cat((state["counted"], counted), dim=1)[:, kept:]
        return y[..., : self.dim], after.replace(inputs=inputs, counted=counts)

    def _with_source(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, state: State | None = None
    ) -> Float[Tensor, "b n c2"]:
        """Tokens with their query source beside them, so that both take the way that tokens take."""
        real = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1).to(x.dtype)
        if state is None:
            tokens, counts = F.pad(x, (0, 0, self.window - 1, 0)), F.pad(real, (0, 0, self.window - 1, 0))
        else:
            tokens = torch.cat((state["inputs"], x), dim=1)
            counts = torch.cat((state["counted"].unsqueeze(-1), real), dim=1)
        # a sum of shifted views: a prefix sum would lose digits, and carry one token's overflow to all later ones
        n = x.shape[1]
        total, count = (
            torch.stack([part[:, shift : shift + n] for shift in range(self.window)]).sum(dim=0) for part in (tokens, counts)
        )
        mean = total / count.clamp(min=1)  # without any real token the sum is 0
        return torch.cat((x, self.query_norm(mean)), dim=-1)
