"""What state spaces with the same diagonal transition at every token share."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.parts.conjugate_pairs import as_complex
from attnlab.ops.backends import accumulate_dtype

DISCRETIZATIONS = ("zoh", "bilinear")


class TimeInvariantSSM(StreamingMixer):
    """Complex states that decay by the same factors at every token, held as pairs of real numbers, ``ssm`` (b, ..., 2).

    A subclass has `discrete`, and in `advance` goes on from ``state["ssm"]``. A masked token is an input of 0 and takes a step.
    """

    memory: ClassVar[tuple[str, ...]] = ("ssm",)

    def discrete(self) -> tuple[Complex[Tensor, "..."], Complex[Tensor, "..."]]:
        """The logarithm of the factor on each state at a token, and the weight of what is written then."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement discrete")

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Zero states in float32 or wider."""
        shape = (batch_size, *self.discrete()[0].shape, 2)
        return State({"ssm": torch.zeros(shape, device=device, dtype=accumulate_dtype(dtype))})

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        """The states from zero, and the factor on earlier ones: ``carry``, shaped like them."""
        _, after = self.advance(x, state, mask=mask)
        carry = torch.view_as_real((self.discrete()[0] * x.shape[1]).exp()).expand_as(after["ssm"])
        return after.replace(carry=carry)

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """What the later piece leaves of the earlier states, and its own; factors multiply."""
        factor = as_complex(later["carry"])
        carried = {"carry": torch.view_as_real(as_complex(earlier["carry"]) * factor)} if "carry" in earlier else {}
        return {"ssm": torch.view_as_real(as_complex(earlier["ssm"]) * factor) + later["ssm"], **carried}


def discretized(
    rates: Complex[Tensor, "..."], steps: Float[Tensor, "..."], rule: str
) -> tuple[Complex[Tensor, "..."], Complex[Tensor, "..."]]:
    r"""The logarithm of $\bar A$, and $\bar B$ for B = 1, of $h' = A h + B u$ with constant steps.

    "zoh": $\bar A = e^{\Delta A}$ and $\bar B = (\bar A - 1) / A$; "bilinear": $\bar A = (1 + \Delta A / 2) / (1 - \Delta A / 2)$
    and $\bar B = \Delta / (1 - \Delta A / 2)$.
    """
    if rule == "zoh":
        log_decay = rates * steps
        return log_decay, torch.expm1(log_decay) / rates
    half = 1 - rates * steps / 2
    return ((1 + rates * steps / 2) / half).log(), steps / half


def initial_steps(shape: tuple[int, ...], low: float, high: float, **place: Any) -> Float[Tensor, "..."]:
    """Logarithms of steps, uniform between those of two bounds; ValueError for bounds out of order."""
    if not 0 < low <= high:
        raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {low} and {high}")
    return torch.empty(shape, **place).uniform_(math.log(low), math.log(high))
