"""What a linear recurrence does at every token, whichever rule it follows: read, write, decay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.core.dynamics import Dynamics
from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.gated_linear_attention import gated_linear_attention


class Steps(NamedTuple):
    r"""$S_t = \mathrm{diag}(a_t) S_{t-1} + k_t u_t^\top$, $o_t = s\,S_t^\top q_t$, with $u_t = v_t$, or by the delta rule.

    Args:
        q: what reads (b, h, n, d).
        k: where is written (b, h, n, d).
        v: what is written (b, h, n, e).
        log_decay: logarithm of a, (b, h, n, d), or (b, h, n, 1) for all channels alike; None: nothing decays, with ``beta``.
        beta: write strengths (b, h, n, 1) of the delta rule, $u_t = \beta_t (v_t - a_t S_{t-1}^\top k_t)$, which needs one decay
            for all channels; None: what is written is v.
        scale: s.
    """

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n e"]
    log_decay: Float[Tensor, "b h n w"] | None
    beta: Float[Tensor, "b h n 1"] | None
    scale: float

    def masked(self, mask: Bool[Tensor, "b n"] | None) -> Steps:
        """The same with tokens that are not real neither writing nor decaying."""
        if mask is None:
            return self
        out = ~mask[:, None, :, None]
        decay, beta = (None if x is None else x.masked_fill(out, 0.0) for x in (self.log_decay, self.beta))
        return self._replace(k=self.k.masked_fill(out, 0.0), log_decay=decay, beta=beta)

    def take(self, index: Int[Tensor, "b m"]) -> Steps:
        """The tokens at ``index``."""

        def gather(x: Tensor) -> Tensor:
            return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        decay, beta = (None if x is None else gather(x) for x in (self.log_decay, self.beta))
        return Steps(gather(self.q), gather(self.k), gather(self.v), decay, beta, self.scale)

    def run(self, state: Float[Tensor, "b h d e"] | None = None) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
        """Outputs and last state."""
        if self.beta is None:
            return gated_linear_attention(self.q, self.k, self.v, self._decay(), scale=self.scale, initial_state=state)
        beta, gate = self.beta.squeeze(-1), None if self.log_decay is None else self.log_decay.squeeze(-1)
        return delta_rule(self.q, self.k, self.v, beta, log_decay=gate, scale=self.scale, initial_state=state)

    def digest(self) -> tuple[Float[Tensor, "b h d e"], Float[Tensor, "b h d _"]]:
        """The state that these tokens leave from nothing, and the map of an earlier one, as `carry` takes it."""
        if self.beta is None:
            return self.run()[1], self._decay().sum(2).exp().unsqueeze(-1).expand(-1, -1, self.k.shape[-1], -1)
        width, values = self.k.shape[-1], self.v.shape[-1]
        nothing = self.v.new_zeros(*self.v.shape[:2], width, values)
        identity = torch.eye(width, device=self.v.device, dtype=self.v.dtype).expand(*self.v.shape[:2], -1, -1)
        both = self._replace(v=torch.cat((self.v, torch.zeros_like(self.k)), dim=-1))
        written, kept = both.run(torch.cat((nothing, identity), dim=-1))[1].split([values, width], dim=-1)
        return written, kept

    def recurrence(self) -> Dynamics:
        """The recurrence's parameters; the state holds the keys' channels."""
        k, q = self.k, self.q * self.scale
        decay = self._decay().exp().expand_as(k)
        if self.beta is None:
            return Dynamics(decay, k, q)
        strong = self.beta * k
        kept = torch.diag_embed(decay) - decay.unsqueeze(-1) * (strong.unsqueeze(-1) * k.unsqueeze(-2))
        return Dynamics(kept, strong, q)

    def _decay(self) -> Float[Tensor, "b h n w"]:
        return torch.zeros_like(self.k[..., :1]) if self.log_decay is None else self.log_decay


def carry(kept: Float[Tensor, "*s d w"], earlier: Float[Tensor, "*s d e"]) -> Float[Tensor, "*s d e"]:
    """What is left of an earlier state, or map: the product with a matrix (d, d), or with its diagonal (d, 1)."""
    return kept * earlier if kept.shape[-1] == 1 else kept @ earlier
