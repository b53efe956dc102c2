"""Multi-query-window attention: a short-query and a long-query branch, mixed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.core.record import record, recording
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.dense.long_query import LONG_QUERY, LongQueryAttention

_NAMES = ("short", "long")


def mix_branches(short: Float[Tensor, "*s"], long: Float[Tensor, "*s"], alpha: float | int) -> Float[Tensor, "*s"]:
    r"""$\alpha\, s + (1 - \alpha)\, l$: of two branches' outputs, or, as published, of two stacks' logits.

    Raises:
        ValueError: for an alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
    return alpha * short + (1 - alpha) * long


@mixers.register("short_long_query", family="dense", paper="mqsa-ted", supports=replace(LONG_QUERY), example={"window": 3})
class ShortLongQueryAttention(StreamingMixer):
    r"""$y = \alpha\,\mathrm{short}(x) + (1-\alpha)\,\mathrm{long}(x)$, two `LongQueryAttention` (after Zhu et al. 2023, MQSA).

    The short branch has L = 1, the long one ``window``; weights are separate. Time, memory and state are those of both. The
    mixing matrix is (b, 2 h, n, m), the heads of the short branch first, each branch times its share; 2 h is what the
    attribute ``num_heads`` says.

    Args:
        dim: width of the tokens.
        num_heads: h, heads of each branch.
        causal: as published; a token uses itself and those before it.
        window: L of the long branch.
        alpha: share of the short branch.
        residual: as for `LongQueryAttention`.
        project_out: likewise.
        position: name of a registered position, in both branches.
        position_options: the position's own options.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an alpha outside [0, 1], or a window below 1.

    Differs from the paper: the branches are mixed in each layer; there two stacks of layers run side by side, and their logits
    are mixed at the end, which is `mix_branches` on two models with ``long_query``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        window: int = 3,
        alpha: float | int = 0.5,
        residual: bool = True,
        project_out: bool = False,
        position: str = "none",
        position_options: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
        common: dict[str, Any] = {"causal": causal, "residual": residual, "project_out": project_out, "position": position}
        common |= {"position_options": position_options, "device": device, "dtype": dtype}
        sizes = {"short": 1, "long": window}
        built = {name: LongQueryAttention(dim, num_heads, window=sizes[name], **common) for name in _NAMES}
        self.branches = nn.ModuleDict(built)
        self.alpha = alpha
        self.num_heads = 2 * num_heads

    @property
    def _both(self) -> list[LongQueryAttention]:
        return [cast("LongQueryAttention", self.branches[name]) for name in _NAMES]

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Both branches on all tokens, mixed."""
        with record(self.branches, only=("values", "mixed")) if recording() else nullcontext() as tape:
            short, long = (branch.mix(x, None, masks, grid) for branch in self._both)
        if tape is not None:
            self.emit("values", lambda: torch.cat([tape[f"{name}/values"] for name in _NAMES], dim=1))
            self.emit("mixed", lambda: self._shared([tape[f"{name}/mixed"] for name in _NAMES]))
        return mix_branches(short, long, self.alpha)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The branches' maps, each times its share."""
        return self._shared([branch.matrix(x, None, masks, grid) for branch in self._both])

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The empty states of both."""
        return self._joined([branch.begin(batch_size, device, dtype) for branch in self._both])

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Each branch from its own state."""
        steps = [one.advance(x, state.part(f"{name}/"), mask=mask) for name, one in zip(_NAMES, self._both, strict=True)]
        return mix_branches(steps[0][0], steps[1][0], self.alpha), self._joined([after for _, after in steps])

    def _shared(self, parts: list[Tensor]) -> Float[Tensor, "b h n e"]:
        return torch.cat((self.alpha * parts[0], (1 - self.alpha) * parts[1]), dim=1)

    @staticmethod
    def _joined(states: list[State]) -> State:
        parts = [state.prefixed(f"{name}/") for name, state in zip(_NAMES, states, strict=True)]
        return State({**parts[0], **parts[1]})
