"""A recurrence over several states of which each token uses some: route, pack, run, scatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.mixers.parts.steps import Steps

States = Float[Tensor, "b r h d e"]


class Routing(NamedTuple):
    """Which tokens use which of r states.

    Args:
        weights: factors (b, n, r) of queries and keys.
        writes: (b, n, r), True where the token writes; elsewhere it neither writes nor lets the state decay.
        reads: (b, n, r), True where it reads.
        weigh: what a weight makes of queries or keys: ``weigh(x, factor)``.
    """

    weights: Float[Tensor, "b n r"]
    writes: Bool[Tensor, "b n r"]
    reads: Bool[Tensor, "b n r"]
    weigh: Callable[[Tensor, Tensor], Tensor]

    def steps(self, steps: Steps, r: int) -> Steps:
        """What every token does to state r."""
        factor, reads = (x[:, None, :, r, None] for x in (self.weights, self.reads))
        q, k = self.weigh(steps.q, factor).masked_fill(~reads, 0.0), self.weigh(steps.k, factor)
        return steps._replace(q=q, k=k).masked(self.writes[..., r])

    def own(self, steps: Steps, r: int) -> tuple[Steps, Int[Tensor, "b m"] | None]:
        """What those that use state r do to it, in order, and which tokens they are; None if they are all."""
        steps = self.steps(steps, r)
        if torch.compiler.is_compiling() or steps.q.is_meta:  # which need lengths that do not depend on data
            return steps, None
        used = (self.writes | self.reads)[..., r]
        count = max(1, int(used.sum(1).max()))
        index = torch.argsort((~used).to(torch.uint8), dim=1, stable=True)[:, :count]
        # tokens that pad a shorter example don't use the state: they write nothing, decay nothing, and read with zeros
        return steps.take(index), index


def run_partitions(steps: Steps, routing: Routing, states: States | None) -> tuple[Float[Tensor, "b h n e"], States]:
    """The sum over states of what is read of them, and the states after it.

    Time is linear in the number of tokens times the states that one uses, however many there are; under compilation every
    state takes all tokens.

    Args:
        steps: of every token, the same for all states but for the routing.
        routing: who uses which.
        states: (b, r, h, d, e); None: zeros.
    """
    parts, lasts = [], []
    for r in range(routing.weights.shape[-1]):
        own, index = routing.own(steps, r)
        heads, last = own.run(None if states is None else states[:, r])
        if index is not None:
            empty = heads.new_zeros(*heads.shape[:2], steps.v.shape[2], heads.shape[3])
            heads = empty.scatter(2, index[:, None, :, None].expand_as(heads), heads)
        parts.append(heads)
        lasts.append(last)
    return torch.stack(parts).sum(0), torch.stack(lasts, 1)
