"""Attention whose scores are the keys' own: softmax over a running sum, the same for every query."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.ops.attention import attention
from attnlab.ops.backends import accumulate_dtype

_CHUNK = 128
_NEVER = -1e30  # the logarithm of an empty sum: no weight beside any score, and finite, so that nothing becomes NaN


@mixers.register(
    "key_score",
    family="linear",
    paper="deconstructing-attention",
    supports=Supports(
        causal="optional",
        pair_mask=True,
        streaming=True,
        grid=frozenset({1, 2, 3}),
        mixing_matrix=True,
        permutation_equivariant=True,
        state="bounded",
        cost=1.0,
    ),
)
class KeyScoreAttention(AttentionMixer, StreamingMixer):
    r"""Attention without queries ("non-approximate" of Xue et al. 2025, Deconstructing Attention).

    $$s_j = d^{-1/2} \sum_c \mathrm{SiLU}(W_Q x_j)_c\, (W_K x_j)_c, \qquad
      o_i = \frac{\sum_{j \le i} e^{s_j} v_j}{\sum_{j \le i} e^{s_j}}$$

    for each head; without causality all j count, and all tokens get the same. Time O(n d), memory O(n d): the weighted mean so
    far goes from chunk to chunk as one more key, whose score is the logarithm of the sum so far, so that no exponential
    overflows. With a pair mask time is O(n^2 d). State: ``mean`` (b, h, d) and ``log_total`` (b, h), in float32 or wider.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all and ``position`` "none".

    Raises:
        ValueError: for grouped keys, or a position, which scores of one token cannot have.

    Differs from the paper: a form that is not causal, and masks.
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        if self.num_kv_heads != num_heads:
            raise ValueError(f"num_kv_heads: expected {num_heads} (each key is scored by its own query), got {self.num_kv_heads}")
        if self.position_name != "none":
            raise ValueError(f"position: expected 'none' (a score is of one token), got {self.position_name!r}")

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """The means of the values, weighed by the scores."""
        n = q.shape[2]
        scores = self._scores(q, k)
        if masks.pair is not None:
            return _mean(scores, v, n, causal=self.causal, key_mask=masks.key, pair_mask=masks.pair)
        if not self.causal:
            return _mean(scores, v, 1, causal=False, key_mask=masks.key).expand(-1, -1, n, -1)
        mean, total = self._empty(v.shape[0], v.shape[3], v.device, v.dtype)
        return self._running(scores, v, masks.key, mean, total)[0]

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The mean of nothing."""
        mean, total = self._empty(batch_size, self.head_dim, device, dtype)
        return State({"mean": mean, "log_total": total})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Take the new tokens into the mean."""
        q, k, v = self.project(x)
        heads, mean, total = self._running(self._scores(q, k), v, mask, state["mean"], state["log_total"])
        return self.join(heads, x, mask), State({"mean": mean, "log_total": total})

    def _scores(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n"]:
        wide = accumulate_dtype(q.dtype)
        return (F.silu(q).to(wide) * k.to(wide)).sum(dim=-1) * self.head_dim**-0.5

    def _empty(self, batch: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = accumulate_dtype(dtype)
        mean = torch.zeros(batch, self.num_heads, width, device=device, dtype=wide)
        return mean, torch.full((batch, self.num_heads), _NEVER, device=device, dtype=wide)

    @staticmethod
    def _running(
        scores: Float[Tensor, "b h n"],
        v: Float[Tensor, "b h n e"],
        mask: Bool[Tensor, "b n"] | None,
        mean: Float[Tensor, "b h e"],
        total: Float[Tensor, "b h"],
    ) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h e"], Float[Tensor, "b h"]]:
        """The means up to each token; the last, and the logarithm of its sum of weights."""
        mean, total = mean.to(scores.dtype), total.to(scores.dtype)
        real = torch.ones_like(scores[:, 0], dtype=torch.bool) if mask is None else mask
        outputs = []
        for s, values, here in zip(scores.split(_CHUNK, 2), v.split(_CHUNK, 2), real.split(_CHUNK, 1), strict=True):
            values = torch.cat((mean.unsqueeze(2), values.to(scores.dtype)), dim=2)
            logits = torch.cat((total.unsqueeze(2), s.masked_fill(~here.unsqueeze(1), _NEVER)), dim=2)
            key_mask = None if mask is None else torch.cat((torch.ones_like(here[:, :1]), here), dim=1)
            out = _mean(logits, values, s.shape[2], causal=True, key_mask=key_mask)
            mean, total = out[:, :, -1], logits.logsumexp(dim=2)
            outputs.append(out.to(v.dtype))
        return torch.cat(outputs, dim=2), mean, total


def _mean(
    scores: Float[Tensor, "b h m"],
    v: Float[Tensor, "b h m e"],
    rows: int,
    *,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
    pair_mask: Bool[Tensor, "#b #h n m"] | None = None,
) -> Float[Tensor, "b h n e"]:
    """Attention of ``rows`` queries that all give key j the logit ``scores[j]``."""
    wide = v.to(scores.dtype)
    q, k = wide.new_zeros(*wide.shape[:2], rows, 1), wide.new_zeros(*wide.shape[:3], 1)
    bias = scores.unsqueeze(2)
    return attention(q, k, wide, bias=bias, causal=causal, key_mask=key_mask, pair_mask=pair_mask).to(v.dtype)
