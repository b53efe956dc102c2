"""Hold a mixer against its definition, values and gradients, in float64 (tier T2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnlab import Mixer, create_mixer


def build(name: str, dim: int = 12, num_heads: int = 3, **options) -> Mixer:
    """A float64 mixer whose parameters are all perturbed, so that none hides behind an initial zero or one."""
    mixer = create_mixer(name, dim, num_heads, **options).double()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return mixer


def tokens(n: int = 9, dim: int = 12, batch: int = 2) -> Tensor:
    """Random float64 tokens that collect a gradient."""
    return torch.randn(batch, n, dim, dtype=torch.float64, requires_grad=True)


def assert_defined_by(mixer: Mixer, definition: Callable[[Tensor], Tensor], x: Tensor, **inputs) -> None:
    """``mixer(x, **inputs)`` equals ``definition(x)`` to 1e-9, and so do all gradients to 1e-8."""
    ours, theirs = mixer(x, **inputs), definition(x)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).detach().abs().max()) <= 1e-9 * float(theirs.detach().abs().max())
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaves = [x, *mixer.parameters()]
    pairs = zip(
        torch.autograd.grad((ours * weight).sum(), leaves, allow_unused=True),
        torch.autograd.grad((theirs * weight).sum(), leaves, allow_unused=True),
        strict=True,
    )
    for a, b in pairs:
        if a is None or b is None:
            assert a is None or float(a.abs().max()) == 0.0
            assert b is None or float(b.abs().max()) == 0.0
            continue
        assert float((a - b).abs().max()) <= 1e-8 * max(float(b.abs().max()), 1e-6)


def split_heads(x: Tensor, heads: int) -> list[Tensor]:
    """(b, n, c) as a list of (b, n, c / heads), one a head."""
    return list(x.chunk(heads, dim=-1))
