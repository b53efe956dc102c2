"""Demands of a check, and the budgets of rounding that they allow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnlab.checking.bench import Measured
from attnlab.checking.outcome import Violation

ROUNDING = 1e-12
"""Relative difference in float64 that the order of sums may make where two runs do the same work: a few thousand ulps."""

FORWARD, BACKWARD = 1e-9, 1e-8
"""Relative difference in float64 that two algorithms for the same function may have, and that of their gradients."""

CANCELLED = 1e-3
"""Inputs, directions and parameters are of size one: less than this is what rounding leaves where terms cancel out (the output
of "pooling minus identity" for one token, the gradient of a bias of the keys under softmax), and is measured by it."""


def require(holds: bool, broken: str) -> None:
    """Raise `Violation` with ``broken`` unless ``holds``."""
    if not holds:
        raise Violation(broken)


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference; infinite where either is not finite."""
    if got.numel() == 0:
        return 0.0
    largest = float((got.detach() - expected.detach()).abs().max())
    return largest if largest == largest else float("inf")


def require_zero(what: str, value: Tensor) -> None:
    """Every element is exactly 0."""
    if value.numel() and not bool((value == 0).all()):
        raise Violation(f"{what} must be exactly 0, is up to {float(value.detach().abs().max()):.3g}")


def require_finite(what: str, value: Tensor) -> None:
    """No element is NaN or infinite."""
    require(bool(torch.isfinite(value).all()), f"{what} has NaN or infinite elements")


def require_close(what: str, got: Tensor, expected: Tensor, tolerance: float, scale: float = CANCELLED) -> None:
    """``got`` is ``expected`` up to ``tolerance``, relative to the largest element expected, and to no less than ``scale``."""
    if got.shape != expected.shape:
        raise Violation(f"{what}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    difference, scale = distance(got, expected), max(largest, scale)
    if not difference <= tolerance * scale:
        relative = difference / scale
        raise Violation(f"{what}: differs by {difference:.3g}, relative {relative:.3g}, allowed {tolerance:.3g}")


def require_gradients(what: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = BACKWARD) -> None:
    """All gradients agree, by name.

    Each is compared relative to its own largest element, and to no less than a thousandth of the largest of all.
    """
    largest = max((float(gradient.abs().max()) for gradient in expected.values() if gradient.numel()), default=1.0)
    for name, gradient in expected.items():
        require_close(f"{what}: gradient of {name}", got[name], gradient, tolerance, CANCELLED * max(largest, 1.0))


def require_same(what: str, got: Measured, expected: Measured, forward: float = FORWARD, backward: float = BACKWARD) -> None:
    """Outputs and all gradients agree."""
    require_close(f"{what}: output", got.output, expected.output, forward)
    require_gradients(what, got.gradients, expected.gradients, backward)
