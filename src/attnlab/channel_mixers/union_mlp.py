"""Union of MLP experts: the hidden units of one perceptron in equal parts, of which a router switches some on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.channel_mixers.mlp import MLP
from attnlab.channel_mixers.registry import channel_mixers
from attnlab.core.grid import Grid
from attnlab.mixers.parts.routing import top_k_mask


@channel_mixers.register("union_mlp", paper="union-of-experts")
class UnionMLP(MLP):
    r"""The MLP cut along its hidden units into E experts, of which k are on (Yang et al. 2025, UoME).

    With the rows $W_1^e$ and columns $W_2^e$ of `MLP` that belong to expert e, and the set S of experts with the k largest
    gates,

    $$y = \sum_{e \in S} W_2^e\, \mathrm{GELU}(W_1^e x + b_1^e) + b_2 .$$

    With k = E it is that MLP, whose parameters it has under the same names. ``routing`` says what a gate reads: "token"
    ($\mathrm{softmax}(W_r x_t)$, a choice of each token: data selection), or "sequence" ($W_r$ over all tokens of an example in a
    row, one choice for all of them: expert selection), which needs ``num_tokens`` and is not for causal models. All hidden units
    are computed; what is off is set to 0, so time and memory are those of the MLP.

    Args:
        dim: width of the tokens.
        hidden: inner width, a multiple of ``num_experts``; by default 4 dim.
        bias: whether both layers have one.
        num_experts: E.
        num_active: k; by default half.
        routing: "token" or "sequence".
        num_tokens: tokens of an example, for "sequence".
        straight_through: hand the gradient of an expert's output to its gate, whose weight in the sum stays 1; without it the
            router has no gradient.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for counts that do not fit, an unknown routing, or another number of tokens than ``num_tokens``.

    Differs from the paper: $b_2$ is added once, where the authors' code has one an expert; the groups of experts that it
    routes to before are left out.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        bias: bool = True,
        num_experts: int = 4,
        num_active: int | None = None,
        routing: str = "token",
        num_tokens: int | None = None,
        straight_through: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, hidden, bias=bias, device=device, dtype=dtype)
        if num_experts < 1 or self.hidden % num_experts:
            raise ValueError(f"num_experts: expected a divisor of hidden={self.hidden}, got {num_experts}")
        num_active = max(1, num_experts // 2) if num_active is None else num_active
        if not 1 <= num_active <= num_experts:
            raise ValueError(f"num_active: expected 1 to num_experts={num_experts}, got {num_active}")
        if routing not in ("token", "sequence"):
            raise ValueError(f"routing: expected 'token' or 'sequence', got {routing!r}")
        if (num_tokens is not None) != (routing == "sequence") or (num_tokens is not None and num_tokens < 1):
            raise ValueError(f"num_tokens: expected a positive integer with routing='sequence' alone, got {num_tokens}")
        self.num_experts, self.num_active, self.num_tokens = num_experts, num_active, num_tokens
        self.straight_through = straight_through
        self.router = nn.Linear(dim * (num_tokens or 1), num_experts, device=device, dtype=dtype)
        if num_tokens is not None:
            self.per_token = False  # type: ignore[misc]  # the choice reads the neighbours

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "b n c"]:
        """Each token through the experts that are on; ``grid`` makes no difference."""
        if self.num_tokens is None:
            gates = self.router(x).softmax(dim=-1)
        else:
            if x.shape[1] != self.num_tokens:
                raise ValueError(f"x: expected num_tokens={self.num_tokens} tokens, got {x.shape[1]}")
            real = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
            gates = self.router(real.flatten(1)).softmax(dim=-1).unsqueeze(1)
        weight = top_k_mask(gates, self.num_active).to(gates.dtype)
        if self.straight_through:
            weight = weight * (1 + gates - gates.detach())
        hidden = F.gelu(self.up(x)).unflatten(-1, (self.num_experts, -1)) * weight.unsqueeze(-1)
        return self.down(hidden.flatten(-2))
