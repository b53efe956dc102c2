"""SnapKV: after the prompt a cache keeps the keys that the prompt's last queries look at."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.mixers.attention import CachedAttention
from attnlab.mixers.parts.causal_options import CausalOptions
from attnlab.mixers.parts.selection import top_k
from attnlab.mixers.sparse.frontier_rules import cache_capacities, cache_importance
from attnlab.ops.attention import attention, attention_map
from attnlab.ops.partial_attention import merge, partial_attention

RULES = ("snap", "ada_snap")
INF = float("inf")


@mixers.register(
    "snap_kv",
    family="sparse",
    paper="sparse-frontier",
    partial=True,
    supports=Supports(causal="always", streaming=True, mixing_matrix=True, discontinuous=True, state="grows", cost=2.0),
    example={"prompt": 6, "capacity": 3, "num_last": 3, "kernel": 3, "num_near": 1, "num_sinks": 1},
)
class SnapKVAttention(CachedAttention):
    r"""Dense attention inside the prompt; later tokens see a part of it (SnapKV, as in Nawrot et al. 2025, 2504.17768).

    With P the length of the prompt, the last w queries of which give key j the weights $p_{gtj}$, g the heads that share keys,

    $$u_j = \mathrm{pool}_j \sum_t \mathrm{mean}_g\, p_{gtj} \qquad \text{or} \qquad u_j = \mathrm{pool}_j \max_{g, t} p_{gtj}$$

    for "snap" and "ada_snap", where pool is the mean of ``kernel`` neighbours, with zeros beyond the ends. A key head keeps the c
    keys with the largest u, the prompt's first and last ones in any case; of "ada_snap" at least a share r of c, and what is left
    of all heads' goes to the largest u of all. Queries from P on use the kept keys and those from P on.

    What is kept depends on the prompt alone, so that this is causal, and the same for a text said at once or token by token.
    ``record`` collects "selection" (b, hk, c), the places kept, -1 for none. Time O(P^2 d) and O((c + i - P) d) for token
    i > P; the state holds as much.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        rule: "snap" or "ada_snap".
        prompt: P; an option, for where a text's prompt ends is no property of its tokens. It may be changed between texts.
        capacity: c.
        num_last: w.
        kernel: odd.
        num_near: last keys of the prompt that are kept.
        num_sinks: first keys that are kept.
        min_ratio: r.
        causal: always True.
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for an unknown rule, sizes below 1, an even kernel, or a position that is a bias.
        UnsupportedError: with ``causal=False``.

    Differs from the paper: the length of the prompt is an option, and ``prompt`` places include masked ones (pad on
    the right), which have neither a say in the choice nor a place in the cache.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        rule: str = "snap",
        prompt: int = 2048,
        capacity: int = 1024,
        num_last: int = 256,
        kernel: int = 21,
        num_near: int = 128,
        num_sinks: int = 4,
        min_ratio: float | int = 0.2,
        causal: bool = True,
        **options: Unpack[CausalOptions],
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, **options)
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")
        sizes = {"prompt": prompt, "capacity": capacity, "num_last": num_last, "kernel": kernel}
        for name, value in (sizes | {"num_near": num_near, "num_sinks": num_sinks}).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd number, got {kernel}")
        if not 0 <= min_ratio <= 1:
            raise ValueError(f"min_ratio: expected 0 to 1, got {min_ratio}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; the choice knows no bias")
        self.rule, self.prompt, self.capacity, self.min_ratio = rule, prompt, capacity, min_ratio
        self.num_last, self.kernel, self.num_near, self.num_sinks = num_last, kernel, num_near, num_sinks

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """A whole sequence: the prompt, the choice, the rest."""
        n, end = q.shape[2], self.prompt
        if n <= end:
            return attention(q, k, v, causal=True, key_mask=masks.key)
        real = k.new_ones(k.shape[0], n, dtype=torch.bool) if masks.key is None else masks.key
        mask = None if masks.key is None else masks.key[:, :end]  # without a mask attention is faster
        before = attention(q[:, :, :end], k[:, :, :end], v[:, :, :end], causal=True, key_mask=mask)
        kept = self._keep(q[:, :, max(0, end - self.num_last) : end], k[:, :, :end], v[:, :, :end], real[:, :end])
        after = None if masks.key is None else masks.key[:, end:]
        return torch.cat((before, _after(q[:, :, end:], kept, k[:, :, end:], v[:, :, end:], after)), dim=2)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No keys; ``recent`` are the prompt's last queries, ``kept_*`` what is left of it once it is over."""
        state = super().begin(batch_size, device, dtype)
        kept = {"kept_k": state["k"].clone(), "kept_v": state["k"].clone()}
        real = torch.ones(batch_size, self.num_kv_heads, 0, device=device, dtype=torch.bool)
        recent = torch.zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype)
        return state.replace(**kept, kept_real=real, recent=recent)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """What is still of the prompt, the choice when it ends, and the rest."""
        b, n = x.shape[:2]
        q, k, v = self.project(x, index=self._index(x, state, mask))
        real = k.new_ones(b, n, dtype=torch.bool) if mask is None else mask
        over = state["kept_k"].shape[2] > 0
        inside = 0 if over else min(n, self.prompt - state["k"].shape[2])
        heads = []
        if inside:
            state = _grown(state, k[:, :, :inside], v[:, :, :inside], real[:, :inside])
            heads.append(attention(q[:, :, :inside], state["k"], state["v"], causal=True, key_mask=state["real"]))
            recent = torch.cat((state["recent"], q[:, :, :inside]), 2)
            state = state.replace(recent=recent[:, :, max(0, recent.shape[2] - self.num_last) :].clone())
            if state["k"].shape[2] == self.prompt:
                kept = self._keep(state["recent"], state["k"], state["v"], state["real"])
                empty = {"k": k[:, :, :0], "v": v[:, :, :0], "real": real[:, :0], "recent": q[:, :, :0]}
                state = state.replace(**dict(zip(("kept_k", "kept_v", "kept_real"), kept, strict=True)), **empty)
        if inside < n:
            state = _grown(state, k[:, :, inside:], v[:, :, inside:], real[:, inside:])
            kept = (state["kept_k"], state["kept_v"], state["kept_real"])
            heads.append(_after(q[:, :, inside:], kept, state["k"], state["v"], state["real"]))
        return self.join(torch.cat(heads, 2), x, mask), state.replace(position=state["position"] + n)

    def _keep(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values that each head keeps of the prompt, and which of them there are, by its last queries."""
        n, w = k.shape[2], q.shape[2]
        place = torch.arange(n, device=k.device)
        pairs = (place <= place[n - w :, None]) & real[:, None, None] & real[:, None, n - w :, None]
        weights = attention_map(q.detach(), k.detach(), pair_mask=pairs).unflatten(1, (self.num_kv_heads, -1))
        scores = cache_importance(weights, self.kernel, largest=self.rule == "ada_snap")
        forced = (place < self.num_sinks) | (place >= n - self.num_near)
        scores = scores.masked_fill(forced, INF).masked_fill(~real[:, None], -INF)
        if self.rule == "snap":
            places = top_k(scores, self.capacity)
        else:
            least = max(int(self.min_ratio * self.capacity), self.num_near + self.num_sinks)
            places, _ = cache_capacities(scores, self.capacity, least)
        self.emit("selection", places)
        index = places.clamp(min=0)
        there = (places >= 0) & real[:, None].expand(-1, k.shape[1], -1).gather(-1, index)
        keys, values = (t.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, t.shape[-1])) for t in (k, v))
        return keys, values, there


def _grown(state: State, k: Tensor, v: Tensor, real: Tensor) -> State:
    """The state with these tokens behind its own."""
    return state.grow(2, k=k, v=v).replace(real=torch.cat((state["real"], real), 1))


def _after(q: Tensor, kept: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor, real: Tensor | None) -> Float[Tensor, "b h n e"]:
    """One softmax over what is kept of the prompt and the tokens after it, of which the last is the last query's own."""
    there = kept[2].repeat_interleave(q.shape[1] // k.shape[1], dim=1).unsqueeze(2)
    far = partial_attention(q, kept[0], kept[1], allowed=there)
    return merge(far, partial_attention(q, k, v, causal=True, key_mask=real)).output
