"""Complex states that stand for conjugate pairs, in real numbers."""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from attnlab.core.dynamics import Dynamics
from attnlab.ops.backends import accumulate_dtype


def as_complex(pairs: Float[Tensor, "*rest 2"]) -> Complex[Tensor, "*rest"]:
    """Neighbouring real and imaginary parts as complex numbers of no less than single precision."""
    pairs = pairs.to(accumulate_dtype(pairs.dtype))
    return torch.complex(pairs[..., 0], pairs[..., 1])


def pair_dynamics(
    transition: Complex[Tensor, "b h n s"],
    write: Complex[Tensor, "b h n s"],
    read: Complex[Tensor, "b h n s"],
    skip: Float[Tensor, "b h n"] | None,
) -> Dynamics:
    r"""The recurrence of complex states whose output is $2\,\mathrm{Re}\langle C, h \rangle$, on twice as many real ones.

    A rate turns real and imaginary part of its state: Lambda is dense, (2 s, 2 s), with a block of 2 x 2 for each state.
    """
    turn = torch.stack((torch.view_as_real(transition), torch.view_as_real(1j * transition)), -1)
    blocks = torch.einsum("...sij,sr->...sirj", turn, torch.eye(turn.shape[-3], device=turn.device, dtype=turn.dtype))
    inputs, outputs = (torch.view_as_real(t).flatten(-2) for t in (write, 2 * read.conj_physical()))
    return Dynamics(blocks.flatten(-4, -3).flatten(-2), inputs, outputs, skip)
