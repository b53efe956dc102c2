"""What attention with a score a key shares: the same softmax for every query, as a mean that runs along the sequence."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.dynamics import Dynamics
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.ops.attention import attention
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.partial_attention import Partial, merge
from attnlab.ops.prefix_softmax import prefix_softmax

PREFIX = Supports(
    causal="optional",
    pair_mask=True,
    streaming=True,
    grid=frozenset({1, 2, 3}),
    mixing_matrix=True,
    permutation_equivariant=True,
    state="bounded",
    associative=True,
    dynamics=True,
    cost=1.0,
)


class PrefixAttention(AttentionMixer, StreamingMixer):
    r"""$o_i = \sum_{j \le i} e^{s_j} v_j \,/ \sum_{j \le i} e^{s_j}$ for each head, with scores $s_j$ of the keys alone.

    Without causality all j count, and all tokens get the same. A subclass gives the scores as `score`. State: ``mean`` (b, h, d)
    and ``lse`` (b, h), the logarithm of the sum of weights, -inf before the first token, both in float32 or wider.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all and ``position`` "none".

    Raises:
        ValueError: for grouped keys, or a position, which scores of one token cannot have.
    """

    memory = ("mean", "lse")

    def __init__(self, dim: int, num_heads: int = 8, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        if self.num_kv_heads != num_heads:
            raise ValueError(f"num_kv_heads: expected {num_heads} (every head keeps its own mean), got {self.num_kv_heads}")
        if self.position_name != "none":
            raise ValueError(f"position: expected 'none' (a score is of one token), got {self.position_name!r}")

    def score(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n"]:
        """The scores of the keys, in float32 or wider: here $d^{-1/2} q_j^\\top k_j$."""
        wide = accumulate_dtype(q.dtype)
        return (q.to(wide) * k.to(wide)).sum(dim=-1) * self.head_dim**-0.5

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """The running means; of all for all without causality; with a pair mask attention whose queries are all alike."""
        n = q.shape[2]
        scores = self.score(q, k)
        if self.causal and masks.pair is None:
            return prefix_softmax(scores, v, mask=masks.key)[0]
        rows = n if self.causal or masks.pair is not None else 1
        wide = v.to(scores.dtype)
        alike, keys = wide.new_zeros(*wide.shape[:2], rows, 1), wide.new_zeros(*wide.shape[:3], 1)
        bias = scores.unsqueeze(2)
        mean = attention(alike, keys, wide, bias=bias, causal=self.causal, key_mask=masks.key, pair_mask=masks.pair)
        return mean.to(v.dtype).expand(-1, -1, n, -1)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The mean of nothing."""
        wide = accumulate_dtype(dtype)
        mean = torch.zeros(batch_size, self.num_heads, self.head_dim, device=device, dtype=wide)
        return State({"mean": mean, "lse": torch.full(mean.shape[:2], float("-inf"), device=device, dtype=wide)})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Take the new tokens into the mean."""
        q, k, v = self.project(x)
        if not self.causal:  # the tokens elsewhere are one more key, with the logarithm of their sum as its score
            own = Partial(*(t[:, :, -1:] for t in prefix_softmax(self.score(q, k), v, mask=mask)))
            heads = merge(Partial(state["mean"].unsqueeze(2).to(v.dtype), state["lse"].unsqueeze(2)), own).output
            return self.join(heads.expand(-1, -1, x.shape[1], -1), x, mask), state
        heads, lse = prefix_softmax(self.score(q, k), v.to(state["mean"].dtype), mask=mask, mean=state["mean"], lse=state["lse"])
        after = State({"mean": heads[:, :, -1], "lse": lse[:, :, -1]})
        return self.join(heads.to(v.dtype), x, mask), after

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        """The mean over the piece."""
        q, k, v = self.project(x)
        means, lses = prefix_softmax(self.score(q, k), v.to(state["mean"].dtype), mask=mask)
        return State({"mean": means[:, :, -1], "lse": lses[:, :, -1]})

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """The mean over both, weighed by their sums."""
        merged = merge(*(Partial(part["mean"].unsqueeze(2), part["lse"].unsqueeze(2)) for part in (earlier, later)))
        return {"mean": merged.output.squeeze(2), "lse": merged.lse.squeeze(2)}

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """A state of one entry, which shrinks by how much the sum of weights grows."""
        q, k, v = self.project(x)
        scores = self.score(q, k)
        lse = prefix_softmax(scores, v, mask=mask)[1]
        before = torch.cat((torch.full_like(lse[:, :, :1], float("-inf")), lse[:, :, :-1]), dim=2)
        shift = lse.masked_fill(lse == float("-inf"), 0.0)
        enters = (scores - shift).exp()
        enters = enters if mask is None else enters.masked_fill(~mask.unsqueeze(1), 0.0)
        return Dynamics((before - shift).exp().unsqueeze(-1), enters.unsqueeze(-1), torch.ones_like(enters).unsqueeze(-1))
