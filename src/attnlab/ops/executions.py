"""Ways to compute exact softmax attention: one function, several orders of work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.core.registry import Registry


@dataclass
class Counts:
    """What a way of computing costs, counted while it runs.

    Args:
        passes: how often the keys are gone through from end to end.
        reads: elements of keys, values and stored logits or weights read.
        exponentials: evaluations of exp on weights (not on the corrections of maxima).
        divisions: divisions.
        live: most elements of logits and weights that exist at once.
    """

    passes: int = 0
    reads: int = 0
    exponentials: int = 0
    divisions: int = 0
    live: int = 0


class Execution(Protocol):
    """``execution(q, k, v, lengths=..., counts=...)``: softmax attention with scale d ** -0.5, exactly.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, h, m, d).
        v: values (b, h, m, e).
        lengths: (b,), how many keys of each example are real, the rest is padding on the right; None for all.
        counts: what the work costs is added to these; None counts nothing.
    """

    def __call__(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m e"],
        *,
        lengths: Int[Tensor, "b"] | None = None,
        counts: Counts | None = None,
    ) -> Float[Tensor, "b h n e"]:
        """The attention's output; 0 for an example without keys."""
        ...


executions: Registry[object] = Registry("execution", "attnlab.ops")
"""All `Execution` functions by name."""

F = TypeVar("F", bound=Callable[..., Tensor])


def execution(name: str, *, family: str, paper: str) -> Callable[[F], F]:
    """Decorator that enters a function as an `Execution`, whose docstring describes the common arguments."""

    def enter(function: F) -> F:
        function.documented_by = (Execution,)  # type: ignore[attr-defined]
        return executions.register(name, family=family, paper=paper)(function)

    return enter


def execute(
    name: str,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    **options: Any,
) -> Float[Tensor, "b h n e"]:
    """Attention by the registered way called ``name``, with its own options.

    Raises:
        UnknownNameError: for an unknown name or option; the nearest ones are named.
    """
    result: Tensor = executions.create(name, q=q, k=k, v=v, **options)  # type: ignore[assignment]
    return result


def real_keys(lengths: Int[Tensor, "b"] | None, start: int, stop: int) -> Bool[Tensor, "b 1 1 m"] | None:
    """True at the real ones of the keys from ``start`` to ``stop``."""
    if lengths is None:
        return None
    return (torch.arange(start, stop, device=lengths.device) < lengths[:, None])[:, None, None]
