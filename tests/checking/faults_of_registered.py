"""Faults in registered mixers: what a slip of the pen there would look like."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.state import State
from checking.planting import plant


def registered(name: str) -> type[Mixer]:
    """The class of a registered mixer."""
    factory = mixers.get(name).factory
    assert isinstance(factory, type)
    return factory


@plant("streaming_splits", "in pieces of")
class WindowForgetsOneKey(registered("sliding_window")):
    def trim(self, state):
        kept = super().trim(state)
        if kept["k"].shape[2] <= self.left:
            return kept
        return kept.replace(k=kept["k"][:, :, 1:], v=kept["v"][:, :, 1:])


@plant("padding_right_equals_shorter", "masked tokens more on the right")
class SigmoidCountsMaskedTokens(registered("sigmoid")):
    def attend(self, q, k, v, masks, grid):
        self.logit_bias = -math.log(k.shape[2])
        return super().attend(q, k, v, masks, grid)


class Unmasked:
    """Hands what stands at masked tokens to the mechanism."""

    def forward(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        y, _ = self.advance(x, self.begin(x.shape[0], x.device, x.dtype), mask=mask)
        return y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0.0)


@plant("padding_left", "masked on the left")
class MambaReadsPadding(registered("mamba")):
    forward = Unmasked.forward


@plant("padding_inside", "masked on the inside")
class DeltaNetReadsPadding(registered("delta_net")):
    forward = Unmasked.forward


@plant("causality_gradient", "output 0 depends on input")
class SoftmaxLooksAhead(registered("softmax")):
    def attend(self, q, k, v, masks, grid):
        causal, self.causal = self.causal, False
        try:
            return super().attend(q, k, v, masks, grid)
        finally:
            self.causal = causal


@plant("streaming_gradient", "gradient of")
class MambaCutsHistory(registered("mamba")):
    def advance(self, x: Tensor, state: State, *, mask: Tensor | None) -> tuple[Tensor, State]:
        y, after = super().advance(x, state, mask=mask)
        return y, after.detach()


@plant("cost_exponent", "declared 1, measured 1.9")
class WindowOverAllPairs(registered("sliding_window")):
    def attend(self, q, k, v, masks, grid):
        return super().attend(q, k, v, masks, grid) + 0.0 * torch.softmax(q @ k.mT, dim=-1) @ v


@plant("permutation_equivariant", "permuting the tokens changes")
class ChannelGroupWithPositions(registered("channel_group")):
    def forward(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        places = torch.linspace(0, 1, x.shape[1], device=x.device, dtype=x.dtype)
        return super().forward(x + places[:, None], mask=mask, grid=grid)


@plant("combined_pieces", "memory 'sum'")
class SummariesForgetToDecay(registered("lightning")):
    def fold(self, earlier, later):
        return super().fold(earlier, later) | {"sum": earlier["sum"] + later["sum"]}


@plant("combined_pieces", "memory 'ssm'")
class SummaryWithoutLookback(registered("mamba")):
    def opening(self, x, before=None):
        return super().opening(x)


@plant("dynamics_are_the_mixing_matrix", "with a mask")
class DynamicsOfPadding(registered("delta_net")):
    def recurrence(self, x, mask):
        return super().recurrence(x, None)
