r"""A causal mixer seen as a linear recurrence whose matrices depend on the tokens, and what can be read off it.

The dynamical-systems view of Amo Alonso et al. 2024 (arXiv 2405.15731, equation 1): for each head,

$$h_i = \Lambda_i h_{i-1} + B_i u_i^\top, \qquad y_i = h_i^\top C_i + D_i u_i ,$$

with values $u_i \in \mathbb{R}^e$, a state $h \in \mathbb{R}^{s \times e}$, and $\Lambda_i$ diagonal or dense. Softmax attention
has no such form of bounded size. What multiplies $u_j$ in $y_i$ is the mixing matrix,
$C_i^\top \Lambda_i \cdots \Lambda_{j+1} B_j$.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor


@dataclass(frozen=True)
class Dynamics:
    """The recurrence's parameters for every head and token.

    Args:
        transition: Lambda, its diagonal (b, h, n, s) or whole (b, h, n, s, s).
        input: B (b, h, n, s), how a token's value enters the state.
        output: C (b, h, n, s), how the state is read after the token entered.
        skip: D (b, h, n), what of the token's own value goes past the state; None for 0.

    Raises:
        ValueError: for shapes that do not fit.
    """

    # what they must be is said where it is checked, so no shape is written here
    transition: Tensor
    input: Tensor
    output: Tensor
    skip: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.input.shape
        if self.output.shape != shape or self.transition.shape not in (shape, (*shape, shape[-1])):
            got = ", ".join(str(tuple(x.shape)) for x in (self.transition, self.input, self.output))
            raise ValueError(f"transition, input, output: expected (b, h, n, s), the first also (b, h, n, s, s), got {got}")
        if self.skip is not None and self.skip.shape != shape[:3]:
            raise ValueError(f"skip: expected {tuple(shape[:3])}, got {tuple(self.skip.shape)}")

    @property
    def diagonal(self) -> bool:
        """Whether the entries of a state do not mix."""
        return self.transition.dim() == 4

    @property
    def state_size(self) -> int:
        """s, entries of the state a head and channel of the values."""
        return self.input.shape[-1]

    def run(self, values: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n e"]:
        """The outputs for these values, token by token from an empty state."""
        state = self.input.new_zeros(*self.input.shape[:2], self.state_size, values.shape[-1])
        outputs = []
        for i, value in enumerate(values.unbind(2)):
            state = self._carry(i, state) + self.input[:, :, i, :, None] * value.unsqueeze(2)
            read = (self.output[:, :, i].unsqueeze(2) @ state).squeeze(2)
            outputs.append(read if self.skip is None else read + self.skip[:, :, i, None] * value)
        return torch.stack(outputs, 2)

    def matrix(self) -> Float[Tensor, "b h n n"]:
        """What multiplies the values: row i holds the weights of all tokens in output i. Time and memory O(n^2 s)."""
        n = self.input.shape[2]
        identity = torch.eye(n, dtype=self.input.dtype, device=self.input.device)
        return self.run(identity.expand(*self.input.shape[:2], n, n))

    def eigenvalues(self) -> Inexact[Tensor, "b h n s"]:
        """Of every transition: how much of a mode is left after the token; beyond 1 in size the state may grow."""
        return self.transition if self.diagonal else torch.linalg.eigvals(self.transition)

    def horizon(self) -> Float[Tensor, "b h n"]:
        r"""Tokens after which the slowest mode has fallen to 1/e, $-1/\ln \max|\lambda|$; infinite where it does not fall."""
        largest = self.eigenvalues().abs().amax(-1)
        return torch.where(largest < 1.0, -1.0 / largest.clamp_max(1.0).log(), torch.inf)

    def _carry(self, i: int, state: Tensor) -> Tensor:
        step = self.transition[:, :, i]
        return step.unsqueeze(-1) * state if self.diagonal else step @ state
