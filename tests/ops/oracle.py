"""Comparing implementations: float64 for equality, and error budgets that float64 sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest deviation relative to the largest entry."""
    if theirs.numel() == 0:
        return 0.0
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30))


def values_and_gradients(function: Callable[..., Tensor | Sequence[Tensor]], *inputs: Tensor) -> list[Tensor]:
    """The outputs of ``function`` and the gradients of a fixed random projection of them for all floating inputs."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(7)
    total = sum((out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum() for out in outputs)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return [out.detach() for out in outputs] + [
        torch.zeros_like(x) if g is None else g for g, x in zip(gradients, wanted, strict=True)
    ]


def assert_equal_in_float64(
    fast: Callable, reference: Callable, *inputs: Tensor, values: float = 1e-9, gradients: float = 1e-8
) -> None:
    """Both functions agree on float64 inputs, outputs to ``values`` and gradients to ``gradients``."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    ours, theirs = values_and_gradients(fast, *wide), values_and_gradients(reference, *wide)
    count = len(theirs) - sum(x.is_floating_point() for x in inputs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        bound = values if index < count else gradients
        scale = max(float(b.abs().max()), 1e-6) if b.numel() else 1.0
        assert a.shape == b.shape
        assert torch.isfinite(a).all()
        assert float((a - b).abs().max() if a.numel() else 0.0) <= bound * scale, f"result {index}: {relative_error(a, b):.2e}"


def assert_within_budget(fast: Callable, reference: Callable, dtype: torch.dtype, *inputs: Tensor, factor: float = 4.0) -> None:
    """In ``dtype`` the fast form's error against float64 is at most ``factor`` times that of the formula in the same dtype."""
    narrow = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    wide = [x.double() if x.is_floating_point() else x for x in narrow]
    truth = values_and_gradients(reference, *wide)
    for index, (a, b, exact) in enumerate(
        zip(values_and_gradients(fast, *narrow), values_and_gradients(reference, *narrow), truth, strict=True)
    ):
        budget = factor * max(relative_error(b, exact), torch.finfo(dtype).eps)
        assert relative_error(a, exact) <= budget, f"result {index}: {relative_error(a, exact):.2e} over {budget:.2e}"


def outputs_and_gradients(
    op: Callable[..., Sequence[Tensor]],
    inputs: Mapping[str, Tensor | None],
    backend: str,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> list[Tensor]:
    """What ``op`` gives for named inputs, and the gradients of those for a fixed random weighting of all results."""
    leaves = {name: None if x is None else x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    results = op(**leaves, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in results]
    grads = torch.autograd.grad(results, [x for x in leaves.values() if x is not None], weights)
    return [x.detach().double() for x in (*results, *grads)]
