"""Extractors: a position-weighted sum of the inputs so far, times a map of the current one. A reconstruction."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, token_positions, zero_masked
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision

_KINDS = ("she", "he", "we", "me")


@mixers.register(
    "extractor",
    family="attention_free",
    paper="extractors",
    supports=Supports(causal="always", streaming=True, state="bounded", cost=1.0),
    example={"max_length": 2048},
)
class Extractor(StreamingMixer):
    r"""The Extractors of Chen (2023), RECONSTRUCTED: no definition in the paper's method section was at hand.

    The super high-performance one, "she", follows the one public implementation by a third party; the other three are our
    reading of "decreasing cost". No equivalence with the paper is claimed. With positions t = 1, 2, ... and
    $\gamma_t = t^{-1/2}$ or 1, every kind multiplies an extraction by an adjustment, $y_t = a_t \odot \gamma_t e_t$:

    $$\text{she: } e_t = \sum_{i \le t} x_i W_{[i,t]}, \quad \text{he: } e_t = \sum_{i \le t} (x_i W_v) \odot w_{[i,t]}, \quad
      \text{we, me: } e_t = \sum_{i \le t} x_i \odot w_{[i,t]}$$

    with $W_j \in \mathbb{R}^{C \times C}$, $w_j \in \mathbb{R}^C$ for j = 1..L, and $a_t = x_t W_a$, but $a_t = x_t$ for "me".
    The index [i, t] is i, which makes a prefix sum, or t - i, which makes a causal convolution. Parameters: $(L + 1) C^2$,
    $2 C^2 + L C$, $C^2 + L C$, $L C$. Time O(n C^2), for "me" O(n C); by distance O(n log n) with FFTs of the weights too.
    State: ``position`` (b,), and ``total`` (b, C) by absolute index, or ``past`` (b, L, C) by distance, where every piece costs
    what a sequence of L tokens costs.

    Args:
        dim: C, width of the tokens.
        num_heads: of the common signature; the mechanism has no heads.
        causal: always True.
        kind: "she", "he", "we" or "me".
        index: "absolute" (i) or "distance" (t - i).
        scale: "inverse_sqrt" ($\gamma_t = t^{-1/2}$) or "none".
        max_length: L; nothing is defined beyond.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an unknown option value; from `forward` and `extend` for an example with more than L real tokens.

    Differs from the paper: positions count real tokens, so that an example has the outputs that it has without its padding,
    wherever that is. Inside a compiled graph the length is not looked at: there the tables fail on a position beyond L.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        kind: str = "she",
        index: str = "absolute",
        scale: str = "inverse_sqrt",
        max_length: int = 128,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        for name, value, known in (
            ("kind", kind, _KINDS),
            ("index", index, ("absolute", "distance")),
            ("scale", scale, ("inverse_sqrt", "none")),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        if max_length < 1:
            raise ValueError(f"max_length: expected a positive integer, got {max_length}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kind, self.index, self.scale, self.max_length = kind, index, scale, max_length
        if kind == "she":
            self.weight = nn.Parameter(torch.randn(max_length, dim, dim, **place) * dim**-0.5)
        else:
            self.weight = nn.Parameter(1.0 + 0.02 * torch.randn(max_length, dim, **place))
        self.v_proj = self._map(dim, place) if kind == "he" else nn.Identity()
        self.adjust_proj = nn.Identity() if kind == "me" else self._map(dim, place)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Nothing extracted yet."""
        shape = (batch_size, self.dim) if self.index == "absolute" else (batch_size, self.max_length, self.dim)
        name = "total" if self.index == "absolute" else "past"
        return State(
            {
                name: torch.zeros(shape, device=device, dtype=accumulate_dtype(dtype)),
                "position": torch.zeros(batch_size, device=device, dtype=torch.int64),
            }
        )

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Extract from the tokens before and the new ones."""
        index = token_positions(*x.shape[:2], mask, start=state["position"], device=x.device)
        after = state["position"] + (x.shape[1] if mask is None else mask.sum(dim=1))
        self._check_room(after)
        y, carried = self._run(x, index, mask, state)
        return y, State({**carried, "position": after})

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """All at once; tables and transforms are no longer than the sequence."""
        index = token_positions(*x.shape[:2], masks.query, device=x.device)
        if x.shape[1] > self.max_length:
            self._check_room(index[:, -1] + 1)
        return self._run(x, index, masks.query, None)[0]

    @staticmethod
    def _map(dim: int, place: dict[str, Any]) -> nn.Linear:
        layer = nn.Linear(dim, dim, bias=False, **place)
        nn.init.normal_(layer.weight, std=dim**-0.5)
        return layer

    def _check_room(self, counts: Int[Tensor, "#b"]) -> None:
        """Refuse more real tokens than there are weights."""
        if torch.compiler.is_compiling() or counts.is_meta:
            return
        longest = int(counts.max())
        if longest > self.max_length:
            raise ValueError(f"x: expected at most max_length={self.max_length} real tokens in all, got {longest}")

    def _run(
        self, x: Float[Tensor, "b n c"], index: Int[Tensor, "#b n"], mask: Bool[Tensor, "b n"] | None, state: State | None
    ) -> tuple[Float[Tensor, "b n c"], dict[str, Tensor]]:
        values = self.v_proj(x)
        index = index.expand(x.shape[:2])  # a masked token shares that of the real one before it, and has the value 0
        run = self._prefix_sum if self.index == "absolute" else self._convolution
        extraction, carried = run(values.to(accumulate_dtype(x.dtype)), index, mask, state)
        if self.scale == "inverse_sqrt":
            extraction = extraction * (index + 1).to(extraction.dtype).rsqrt().unsqueeze(-1)
        self.emit("extraction", extraction)
        return self.adjust_proj(x) * extraction.to(x.dtype), carried

    @full_precision
    def _prefix_sum(
        self,
        values: Float[Tensor, "b n c"],
        index: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"] | None,
        state: State | None,
    ) -> tuple[Float[Tensor, "b n c"], dict[str, Tensor]]:
        weight = self.weight.to(values.dtype)
        if weight.dim() == 2:
            terms = values * F.embedding(index, weight)
        elif state is not None and index.numel() <= self.max_length:
            # A few tokens, each example at its own position: what is gathered is no larger than the weights themselves.
            terms = torch.einsum("bnd,bndf->bnf", values, weight[index])
        else:
            placed = self._place(values, index, mask, state)
            terms = torch.einsum("bsd,sdf->bsf", placed, weight[: placed.shape[1]])
            terms = zero_masked(self._pick(terms, index), mask)
        total = terms.cumsum(dim=1)
        if state is not None:
            total = state["total"].unsqueeze(1) + total
        return total, {"total": total[:, -1].clone()}

    @full_precision
    def _convolution(
        self,
        values: Float[Tensor, "b n c"],
        index: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"] | None,
        state: State | None,
    ) -> tuple[Float[Tensor, "b n c"], dict[str, Tensor]]:
        placed = self._place(values, index, mask, state)
        if state is not None:
            placed = state["past"] + placed
        length = placed.shape[1]
        signal = torch.fft.rfft(placed, 2 * length, dim=1)
        kernel = torch.fft.rfft(self.weight[:length].to(values.dtype), 2 * length, dim=0)
        product = torch.einsum("bkd,kdf->bkf", signal, kernel) if kernel.dim() == 3 else signal * kernel
        return self._pick(torch.fft.irfft(product, 2 * length, dim=1)[:, :length], index), {"past": placed}

    def _place(
        self,
        values: Float[Tensor, "b n c"],
        index: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"] | None,
        state: State | None,
    ) -> Float[Tensor, "b s c"]:
        """Values at their positions: each weight matrix is then used where it lies, and none is gathered a token."""
        n = values.shape[1]
        if state is None and mask is None:
            return values
        slots = self.max_length if state is not None else min(n, self.max_length)
        place = values.new_zeros(values.shape[0], slots, values.shape[2])
        return place.scatter_add(1, index.unsqueeze(-1).expand_as(values), values)

    @staticmethod
    def _pick(placed: Float[Tensor, "b s c"], index: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """What stands at each token's position."""
        return placed.gather(1, index.unsqueeze(-1).expand(-1, -1, placed.shape[2]))
