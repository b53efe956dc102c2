"""How an attention map is shaped into the adjacency of a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.errors import UnknownNameError, nearest

Allowed = Bool[Tensor, "#b #h #n #m"] | None


@dataclass(frozen=True)
class Shaping:
    r"""A named function of the map A, 0 again at pairs that are not allowed.

    ================  ========================================================================================
    "none"            $A$
    "relu"            $\max(A - t, 0)$
    "silu"            $\mathrm{SiLU}(A - t)$
    "softplus"        $\mathrm{softplus}(A - t)$
    "sharp_softplus"  $\mathrm{softplus}(\beta (A - t)) / \beta$
    "sigmoid"         $\sigma(\beta (A - t))$
    "binary"          $1$ where $A > t$
    "top_k"           $1$ at the $\max(1, \lfloor f N \rfloor)$ largest of a row's N allowed entries
    "flow"            $\sigma(5 A)\,\sigma(50 (A - t))$
    ================  ========================================================================================

    "binary" and "top_k" let no gradient through; of equal entries the first come first.

    Args:
        name: which one.
        threshold: t.
        sharpness: $\beta$, positive.
        fraction: f, above 0 and at most 1.

    Raises:
        UnknownNameError: for another name.
        ValueError: for a sharpness or fraction out of range.
    """

    name: str = "none"
    threshold: float | int = 0.2
    sharpness: float | int = 10.0
    fraction: float | int = 0.1

    def __post_init__(self) -> None:
        if self.name not in SHAPINGS:
            raise UnknownNameError(
                f"adjacency: expected one of {sorted(SHAPINGS)}, got {self.name!r}{nearest(self.name, SHAPINGS)}"
            )
        if self.sharpness <= 0:
            raise ValueError(f"sharpness: expected a positive number, got {self.sharpness}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: expected above 0 and at most 1, got {self.fraction}")

    @property
    def jumps(self) -> bool:
        """Whether an entry jumps as the map changes."""
        return self.name in ("binary", "top_k")

    def __call__(self, graph: Float[Tensor, "b h n m"], allowed: Allowed) -> Float[Tensor, "b h n m"]:
        """The adjacency."""
        shaped = SHAPINGS[self.name](graph, allowed, self)
        return shaped if allowed is None else shaped.masked_fill(~allowed, 0.0)


def _top_k(graph: Tensor, allowed: Allowed, how: Shaping) -> Tensor:
    # N counts what the row may use, not the length of the sequence, of which a causal row must not know.
    if allowed is None:
        count = torch.full((1, 1, 1, 1), graph.shape[-1], device=graph.device)
    else:
        graph, count = graph.masked_fill(~allowed, float("-inf")), allowed.sum(dim=-1, keepdim=True)
    k = (count.double() * how.fraction).floor().clamp(min=1)
    rank = graph.detach().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < k).to(graph.dtype)


SHAPINGS: dict[str, Callable[[Tensor, Allowed, Shaping], Tensor]] = {
    "none": lambda graph, allowed, how: graph,
    "relu": lambda graph, allowed, how: torch.relu(graph - how.threshold),
    "silu": lambda graph, allowed, how: F.silu(graph - how.threshold),
    "softplus": lambda graph, allowed, how: F.softplus(graph - how.threshold),
    "sharp_softplus": lambda graph, allowed, how: F.softplus(graph - how.threshold, beta=how.sharpness),
    "sigmoid": lambda graph, allowed, how: torch.sigmoid(how.sharpness * (graph - how.threshold)),
    "binary": lambda graph, allowed, how: (graph > how.threshold).to(graph.dtype),
    "top_k": _top_k,
    "flow": lambda graph, allowed, how: torch.sigmoid(5.0 * graph) * torch.sigmoid(50.0 * (graph - how.threshold)),
}
"""The functions by name, of the map, the allowed pairs and the constants."""
