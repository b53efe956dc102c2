"""The correctness gate: the fast path against the reference, outputs and gradients, before any of its speeds is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.compare.layers import Layer, build_layer, random_input
from attnlab.ops.backends import use_backend

OUTPUTS_64, GRADIENTS_64 = 1e-9, 1e-8
"""Relative differences allowed in float64."""
FACTOR_32, FLOOR_32 = 4.0, 1e-6
"""In float32: the fast path's error may be this multiple of the plain formula's own, plus a few units in the last place."""
TOKENS = 300
"""Tokens of a gate: beyond the usual windows and chunks, and a multiple of neither."""

Numbers = Float[Tensor, "_"]


@dataclass(frozen=True)
class Agreement:
    """Relative differences, in the Euclidean norm, from the reference in float64: of outputs, and of gradients.

    Args:
        outputs64: of the fast path's outputs in float64.
        gradients64: of its gradients.
        outputs32: of the fast path's outputs in float32.
        gradients32: of its gradients.
        plain_outputs32: of the reference's own outputs in float32.
        plain_gradients32: of its gradients.
        error: what was raised instead of an answer.
    """

    outputs64: float = 0.0
    gradients64: float = 0.0
    outputs32: float = 0.0
    gradients32: float = 0.0
    plain_outputs32: float = 0.0
    plain_gradients32: float = 0.0
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether all of them are within what rounding explains."""
        return (
            self.error is None
            and self.outputs64 <= OUTPUTS_64
            and self.gradients64 <= GRADIENTS_64
            and self.outputs32 <= FACTOR_32 * self.plain_outputs32 + FLOOR_32
            and self.gradients32 <= FACTOR_32 * self.plain_gradients32 + FLOOR_32
        )

    def record(self) -> dict[str, Any]:
        """As JSON holds it; what is not finite becomes None."""
        values = {
            name: value if not isinstance(value, float) or value < float("inf") else None for name, value in asdict(self).items()
        }
        return {**values, "passed": self.passed}


def agreement(run: Callable[[torch.dtype], tuple[Numbers, Numbers]]) -> Agreement:
    """Compare ``run``, which gives outputs and gradients in a dtype, with itself under the reference backend."""
    with use_backend("reference"):
        exact, plain = run(torch.float64), run(torch.float32)
    fast64, fast32 = run(torch.float64), run(torch.float32)
    outputs = [_relative(got[0], exact[0]) for got in (fast64, fast32, plain)]
    gradients = [_relative(got[1], exact[1]) for got in (fast64, fast32, plain)]
    return Agreement(outputs[0], gradients[0], outputs[1], gradients[1], outputs[2], gradients[2])


def _relative(found: Numbers, expected: Numbers) -> float:
    difference = float(torch.linalg.vector_norm(found.double() - expected.double()))
    size = float(torch.linalg.vector_norm(expected.double()))
    return difference / size if size > 0 else difference


def gate(layer: Layer, tokens: int = TOKENS) -> Agreement:
    """The agreement of one mixer layer in evaluation mode, on random tokens; a failure to run is a failed gate."""

    def run(dtype: torch.dtype) -> tuple[Numbers, Numbers]:
        mixer = build_layer(layer, tokens, seed=0).to(dtype).eval()
        x, grid = random_input(layer, tokens, seed=1)
        x = x.to(dtype).requires_grad_()
        y = mixer(x, grid=grid)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        wanted = [x, *(p for p in mixer.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(y, wanted, cotangent, allow_unused=True)
        return y.detach().flatten(), torch.cat([g.flatten() for g in gradients if g is not None])

    try:
        return agreement(run)
    except Exception as error:
        return Agreement(error=f"{type(error).__name__}: {error}")
