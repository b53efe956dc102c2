"""Two small mixers that keep every law: what the planted faults of `checking.faults` are planted into.

`ToyAttention` is softmax attention with a gate (causal or not, with context, masks, a growing state, a mixing matrix);
`ToyRecurrence` is a decayed sum of a short convolution with a gate (always causal, a bounded state).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.core.contract import Mixer
from attnlab.core.info import MixerInfo, Supports, read_options
from attnlab.core.masks import allowed_pairs
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.ops.backends import Op


def promising(cls: type[Mixer], base: Supports, example: tuple[tuple[str, Any], ...] = (), **changes: Any) -> type[Mixer]:
    """``cls`` with the info of a mixer that promises ``base`` with ``changes``; the registry is left alone."""
    supports = replace(base, **changes)
    cls.info = MixerInfo(cls.__name__, "mixer", cls.__name__, "toys", None, read_options(cls), supports, example)
    return cls


def weigh(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the allowed pairs; a row without any is 0."""
    if allowed is None:
        return logits.softmax(dim=-1)
    usable = allowed | ~allowed.any(dim=-1, keepdim=True)
    return logits.masked_fill(~usable, float("-inf")).softmax(dim=-1).masked_fill(~allowed, 0.0)


def by_loops(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """Row by row."""
    scale = q.shape[-1] ** -0.5
    allowed = None if allowed is None else allowed.expand(*q.shape[:3], k.shape[2])
    rows = []
    for i in range(q.shape[2]):
        logits = torch.einsum("bhd,bhmd->bhm", q[:, :, i], k) * scale
        rows.append(torch.einsum("bhm,bhme->bhe", weigh(logits, None if allowed is None else allowed[:, :, i]), v))
    return torch.stack(rows, dim=2)


def at_once(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """All rows in one product."""
    return weigh(q @ k.mT * q.shape[-1] ** -0.5, allowed) @ v


def attention_op(name: str, eager: Callable[..., Tensor]) -> Op:
    """The toy's op with another fast path."""
    return Op(name, {"reference": by_loops, "eager": eager})


class ToyAttention(StreamingMixer):
    """Softmax attention, times a gate."""

    op = attention_op("toy_attention", at_once)

    def __init__(self, dim: int, num_heads: int = 8, *, causal: bool = False, device=None, dtype=None) -> None:
        super().__init__(dim, num_heads, causal=causal)
        place = {"device": device, "dtype": dtype}
        self.query, self.out, self.gate = (nn.Linear(dim, dim, **place) for _ in range(3))
        self.key_value = nn.Linear(dim, 2 * dim, **place)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.key_value(x if context is None else context).chunk(2, dim=-1)
        return self.heads(self.query(x)), self.heads(k), self.heads(v)

    def pairs(self, q: Tensor, k: Tensor, key_mask: Tensor | None, pair_mask: Tensor | None) -> Tensor | None:
        n, m = q.shape[2], k.shape[2]
        return allowed_pairs(n, m, causal=self.causal, key_mask=key_mask, pair_mask=pair_mask, device=q.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        return type(self).op("auto", q)(q, k, v, allowed)

    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.out(mixed.transpose(1, 2).flatten(2)) * torch.sigmoid(self.gate(x))

    def mix(self, x, context, masks, grid):
        q, k, v = self.project(x, context)
        mixed = self.attend(q, k, v, self.pairs(q, k, masks.key, masks.pair))
        self.emit("values", v)
        self.emit("mixed", mixed)
        return self.finish(mixed, x, masks.query)

    def matrix(self, x, context, masks, grid):
        q, k, _ = self.project(x, context)
        allowed = self.pairs(q, k, masks.key, masks.pair)
        return weigh(q @ k.mT * q.shape[-1] ** -0.5, allowed)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        empty = torch.zeros(batch_size, self.num_heads, 0, self.dim // self.num_heads, device=device, dtype=dtype)
        real = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
        return State({"k": empty, "v": empty.clone(), "real": real})

    def advance(self, x: Tensor, state: State, *, mask: Tensor | None) -> tuple[Tensor, State]:
        q, k, v = self.project(x, None)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        after = {
            "k": torch.cat([state["k"], k], dim=2),
            "v": torch.cat([state["v"], v], dim=2),
            "real": torch.cat([state["real"], real], dim=1),
        }
        mixed = self.attend(q, after["k"], after["v"], self.pairs(q, after["k"], after["real"], None))
        return self.finish(mixed, x, mask), State(after)


promising(
    ToyAttention,
    Supports(
        causal="optional",
        cross=True,
        pair_mask=True,
        streaming=True,
        mixing_matrix=True,
        permutation_equivariant=True,
        state="grows",
        cost=2,
    ),
)


class ToyRecurrence(StreamingMixer):
    """A decayed sum of a convolution over the last three tokens, times a gate."""

    reach = 3

    def __init__(self, dim: int, num_heads: int = 8, *, causal: bool = True, device=None, dtype=None) -> None:
        super().__init__(dim, num_heads, causal=causal)
        place = {"device": device, "dtype": dtype}
        self.filter = nn.Parameter(torch.randn(self.reach, dim, **place))
        self.decay = nn.Parameter(torch.randn(dim, **place))
        self.out, self.gate = (nn.Linear(dim, dim, **place) for _ in range(2))

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return State(
            {
                "tail": torch.zeros(batch_size, self.reach - 1, self.dim, device=device, dtype=dtype),
                "total": torch.zeros(batch_size, self.dim, device=device, dtype=dtype),
            }
        )

    def convolve(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution and the tokens that the next piece needs."""
        n = x.shape[1]
        seen = torch.cat([tail, x], dim=1)
        return sum(seen[:, i : i + n] * self.filter[i] for i in range(self.reach)), seen[:, n:]

    def accumulate(self, u: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """The decayed sum after each token, and the last."""
        decay, sums = torch.sigmoid(self.decay), []
        for step in u.unbind(dim=1):
            total = decay * total + step
            sums.append(total)
        return torch.stack(sums, dim=1), total

    def advance(self, x: Tensor, state: State, *, mask: Tensor | None) -> tuple[Tensor, State]:
        u, tail = self.convolve(x, state["tail"])
        sums, total = self.accumulate(u, state["total"])
        return self.out(sums) * torch.sigmoid(self.gate(x)), State({"tail": tail, "total": total})


promising(ToyRecurrence, Supports(causal="always", streaming=True, state="bounded", cost=1))
