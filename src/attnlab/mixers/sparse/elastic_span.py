"""Elastic spans: each head has its own sliding window, which a rule makes longer for longer texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.core.tilings import segments_of
from attnlab.mixers.attention import AttentionMixer
from attnlab.mixers.parts.causal_options import CausalOptions
from attnlab.ops.sliding_window import sliding_window_attention
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention

Rule = float | int | Sequence[float | int]
SPARSE = Supports(causal="always", streaming=True, mixing_matrix=True, state="bounded", cost=1.0)


def elastic_blocks(alpha: float | int, beta: float | int, block: int, length: int) -> int:
    r"""$w = \max(1, \mathrm{int}(\lfloor \alpha / b \rfloor + \beta N / b))$, blocks of a span for a text of N tokens."""
    return max(1, int(alpha // block + beta * length / block))


@mixers.register(
    "elastic_span",
    family="sparse",
    paper="moa-mixture-of-sparse-attention",
    partial=True,
    supports=SPARSE,
    example={"alpha": (0, 2, 4, 2), "beta": 0.1, "block": 2, "length": 20},
)
class ElasticSpanAttention(AttentionMixer, StreamingMixer):
    r"""Sinks and a sliding window, as long as the head's rule says (Fu et al. 2024, MoA, arXiv 2406.14909).

    Head h has a span of $w_h = \max(1, \mathrm{int}(\lfloor \alpha_h / b \rfloor + \beta_h N / b))$ blocks of b tokens, with N
    the ``length`` that the spans are set for, and

    $$o_i = \sum_{j \in N_h(i)} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j)\, v_j, \qquad
      N_h(i) = \{j \le i : j < b \;\text{or}\; j > i - w_h b\}$$

    as its decoder caches keys; with ``unit="block"``, as its prefill masks them, the second condition is
    $\lfloor j / b \rfloor > \lfloor i / b \rfloor - w_h$. Heads with equal spans are computed together. Time O(n \bar w b d),
    memory O(n d). The state holds at most $(w_h + 1) b - 1$ keys and values of each key head.

    Args:
        dim: width of the tokens.
        num_heads: heads; those that share keys share a rule.
        alpha: $\alpha$ in tokens, one number or one a key head; may be negative.
        beta: $\beta$, likewise.
        block: b; the first b tokens are sinks.
        length: N. It is an option and not the number of tokens given, on which what a causal model has said must not depend;
            it may be changed between texts.
        unit: "token" or "block"; only the first streams.
        causal: always True.
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for another number of rules than key heads, sizes below 1, an unknown unit, or a position that is a bias.
        UnsupportedError: with ``causal=False``.

    Differs from the paper: the profiler that finds the rules, and the plans released by the authors, are not part of it. Sinks
    are the first b places, real or not: pad on the right.
    """

    unit: str = "token"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        alpha: Rule = 0,
        beta: Rule = 0.5,
        block: int = 64,
        length: int = 4096,
        unit: str = "token",
        causal: bool = True,
        **options: Unpack[CausalOptions],
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, **options)
        for name, value in (("block", block), ("length", length)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if unit not in ("token", "block"):
            raise ValueError(f"unit: expected 'token' or 'block', got {unit!r}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(
                f"position: expected 'none' or 'rotary', got {self.position_name!r}; a bias has no place in a window"
            )
        self.alpha, self.beta = self._rules("alpha", alpha), self._rules("beta", beta)
        self.block, self.length, self.unit = block, length, unit

    @property
    def supports(self) -> Supports:
        """Spans of blocks do not stream."""
        found = self.info.supports
        return found if self.unit == "token" else Supports(causal="always", mixing_matrix=True, cost=found.cost)

    @property
    def spans(self) -> tuple[int, ...]:
        """$w_h$ of each key head, in blocks."""
        rules = zip(self.alpha, self.beta, strict=True)
        return tuple(elastic_blocks(alpha, beta, self.block, self.length) for alpha, beta in rules)

    @property
    def groups(self) -> dict[int, list[int]]:
        """The key heads of each span."""
        spans = self.spans
        return {span: [head for head, own in enumerate(spans) if own == span] for span in sorted(set(spans))}

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over sinks and windows, once for each span."""
        run = self._by_tokens if self.unit == "token" else self._by_blocks
        parts = [run(self._queries(q, heads), k[:, heads], v[:, heads], masks.key, span) for span, heads in self.groups.items()]
        return self._together(parts)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No keys yet; each span has its own."""
        tensors = {"position": torch.zeros(batch_size, device=device, dtype=torch.int64)}
        for number, heads in enumerate(self.groups.values()):
            empty = torch.zeros(batch_size, len(heads), 0, self.head_dim, device=device, dtype=dtype)
            real = torch.ones(batch_size, 0, device=device, dtype=torch.bool)
            tensors |= {f"k{number}": empty, f"v{number}": empty.clone(), f"real{number}": real}
        return State(tensors)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Attend over the kept keys and the new ones, and keep what later queries can reach."""
        n = x.shape[1]
        q, k, v = self.project(x, index=state["position"][:, None] + torch.arange(n, device=x.device))
        new = x.new_ones(x.shape[0], n, dtype=torch.bool) if mask is None else mask
        parts, after = [], {"position": state["position"] + n}
        for number, (span, heads) in enumerate(self.groups.items()):
            keys = torch.cat((state[f"k{number}"], k[:, heads]), 2)
            values = torch.cat((state[f"v{number}"], v[:, heads]), 2)
            real = torch.cat((state[f"real{number}"], new), 1)
            parts.append(self._by_tokens(self._queries(q, heads), keys, values, real, span))
            after[f"k{number}"], after[f"v{number}"] = self._recent(keys, 2, span), self._recent(values, 2, span)
            after[f"real{number}"] = self._recent(real, 1, span)
        return self.join(self._together(parts), x, mask), State(after)

    def _rules(self, name: str, value: Rule) -> tuple[float | int, ...]:
        if isinstance(value, Sequence) and len(value) != self.num_kv_heads:
            raise ValueError(f"{name}: expected one number, or {self.num_kv_heads}, one a key head, got {len(value)}")
        return tuple(value) if isinstance(value, Sequence) else (value,) * self.num_kv_heads

    def _queries(self, q: Tensor, heads: list[int]) -> Tensor:
        """The queries that read these key heads."""
        return q.unflatten(1, (self.num_kv_heads, -1))[:, heads].flatten(1, 2)

    def _together(self, parts: list[Tensor]) -> Tensor:
        """The parts of all spans in the order of the heads."""
        order = [head for heads in self.groups.values() for head in heads]
        found = torch.cat(
            [part.unflatten(1, (len(heads), -1)) for part, heads in zip(parts, self.groups.values(), strict=True)], 1
        )
        return found[:, [order.index(head) for head in range(self.num_kv_heads)]].flatten(1, 2)

    def _by_tokens(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, span: int) -> Tensor:
        """The window of the cache."""
        return sliding_window_attention(q, k, v, left=span * self.block - 1, num_sinks=self.block, key_mask=real)

    def _by_blocks(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, span: int) -> Tensor:
        """Whole blocks of keys for a block of queries."""
        n, block = q.shape[2], self.block
        queries = segments_of(n, block).to(q.device)
        number = torch.arange(len(queries), device=q.device)[:, None]
        seen = torch.cat((number * 0, number - torch.arange(min(span, len(queries)), device=q.device)), 1)
        # the first block is a sink where it is not in the span already
        gone = torch.cat(((number < span), seen[:, 1:] < 0), 1)
        keys = torch.where(gone.unsqueeze(-1), -1, queries[seen.clamp(min=0)]).flatten(1)
        found = tile_attention(q, k, v, queries[None, None], keys[None, None], causal=True, key_mask=real)
        return from_tiles(found.output, places_of(queries, n))

    def _recent(self, tensor: Tensor, dim: int, span: int) -> Tensor:
        length, left = tensor.shape[dim], span * self.block - 1
        if length <= self.block + left:
            return tensor
        return torch.cat((tensor.narrow(dim, 0, self.block), tensor.narrow(dim, length - left, left)), dim=dim)
