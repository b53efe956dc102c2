"""Faults in what a mixer says of itself and in how it is built: flags that lie in either direction, refusals, errors, types."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.core.contract import Mixer
from attnlab.core.masks import Masks
from attnlab.core.state import State
from checking.planting import plant
from checking.toys import ToyAttention, ToyRecurrence

# Flags that promise too much


@plant("permutation_equivariant", "permuting the tokens changes the output")
class NotEquivariant(ToyAttention):
    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        place = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None] / x.shape[1]
        return super().project(x + place, context)


@plant("streaming_state_bounded", "declared bounded", state="bounded")
class GrowsThoughBounded(ToyAttention):
    """Keeps all keys."""


@plant("cost_exponent", "declared 1, measured", cost=1)
class QuadraticThoughLinear(ToyAttention):
    """Forms all pairs."""


@torch.library.custom_op("attnlab_tests::nothing_from_all_pairs", mutates_args=(), schema="(Tensor x) -> Tensor")
def nothing_from_all_pairs(x):
    return 0.0 * (x @ x.mT).sum(dim=-1, keepdim=True)


@plant("cost_exponent", "declared 1, measured")
class QuadraticInCustomOperator(ToyRecurrence):
    def accumulate(self, u: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        sums, total = super().accumulate(u, total)
        return sums + nothing_from_all_pairs(u), total


@plant("batch_coupled", "no output depends on another example", batch_coupled=True)
class NotCoupled(ToyAttention):
    """Each example is alone."""


@plant("flags_agree", "streaming=True contradicts state='none'", state="none")
class StateOfNothing(ToyRecurrence):
    """Streams without a state, it says."""


@plant("grid_ranks", "grid", grid=frozenset({1, 2}))
class NoGridInFact(ToyAttention):
    def mix(self, x, context, masks, grid):
        if len(grid) == 2 and grid[0] > grid[1]:
            raise ValueError("only wide grids")
        return super().mix(x, context, masks, grid)


@plant("jumps", "declare discontinuous=False", discontinuous=True)
class SmoothThoughDiscontinuous(ToyAttention):
    """Softmax has no jump."""


# Flags that deny what works


@plant("continuous", "declare discontinuous=True")
class JumpsThoughContinuous(ToyAttention):
    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(mixed, x, mask) * torch.where(x[..., :1] > 0, 1.0, 1.1)


@plant("reads_the_future", "declare causal='always'", causal="no", streaming=False, state="none")
class CausalThoughNot(ToyRecurrence):
    def __init__(self, dim, num_heads=8, *, causal=False, device=None, dtype=None) -> None:
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype)


@plant("order_matters", "declare permutation_equivariant=True", permutation_equivariant=False)
class EquivariantThoughNot(ToyAttention):
    """Has no positions."""


@plant("no_pair_mask", "declare pair_mask=True", pair_mask=False)
class PairMaskDenied(ToyAttention):
    """Its `mix` takes one."""


@plant("no_mixing_matrix", "declare mixing_matrix=True", mixing_matrix=False)
class MatrixDenied(ToyAttention):
    """Its `matrix` gives one."""


@plant("streaming_state_grows", "declared growing", state="grows")
class BoundedThoughGrowing(ToyRecurrence):
    """Keeps a sum."""


@plant("cost_exponent", "needlessly high", cost=2)
class LinearThoughQuadratic(ToyRecurrence):
    """One pass."""


# Refusals and errors


class Careless(ToyAttention):
    """Takes what it is given."""

    def forward(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        return self.mix(x, context, Masks(mask, mask if context is None else context_mask, pair_mask), grid)


@plant("refusals", "pair_mask: is not promised, but is not refused", pair_mask=False)
class SilentAboutPairMask(Careless):
    """Ignores or applies it, and says nothing."""


@plant("refusals", "expected UnsupportedError, got AttributeError", mixing_matrix=False)
class CrashesInstead(ToyAttention):
    def mixing_matrix(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        return self.no_such_thing


@plant("bad_input", "x a list: the TypeError does not name 'x'")
class Unvalidated(Careless):
    """Fails somewhere inside."""


@plant("bad_input_streaming", "state a dict")
class UnvalidatedState(ToyAttention):
    def extend(self, x: Tensor, state: State, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        return self.advance(x, state, mask=mask)


@plant("bad_options", "dim no multiple of num_heads: accepted")
class RoundsHeads(ToyAttention):
    def __init__(self, dim, num_heads=8, *, causal=False, device=None, dtype=None) -> None:
        if dim % num_heads:
            num_heads = 1
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype)


# Construction and types


@plant("matches_signature", "swallows any option")
class Sink(ToyAttention):
    def __init__(self, dim, num_heads=8, *, causal=False, device=None, dtype=None, **rest) -> None:
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype)


@plant("state_dict_round_trip", "another instance gives another output")
class ForgottenDraw(ToyAttention):
    def __init__(self, dim, num_heads=8, *, causal=False, device=None, dtype=None) -> None:
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype)
        self.register_buffer("direction", torch.randn(dim, device=device, dtype=dtype), persistent=False)

    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(mixed, x, mask) * self.direction


@plant("meta_device", "direction is on cpu")
class OnTheCpu(ToyAttention):
    def __init__(self, dim, num_heads=8, *, causal=False, device=None, dtype=None) -> None:
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype)
        self.register_buffer("direction", torch.ones(dim))


@plant("dtype_device_options", "gain has torch.float32")
class SingleOnly(ToyAttention):
    def __init__(self, dim, num_heads=8, *, causal=False, device=None, dtype=None) -> None:
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype)
        self.gain = nn.Parameter(torch.ones(dim, device=device))

    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(mixed, x, mask) * self.gain


@plant("builds", "no such form")
class DoesNotBuild(ToyAttention):
    def __init__(self, dim, num_heads=8, *, causal=False, device=None, dtype=None) -> None:
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype)
        if causal:
            raise RuntimeError("no such form")


@plant("tensor_in_tensor_out", "changed x")
class WritesToInput(ToyRecurrence):
    def forward(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        y = Mixer.forward(self, x, context, mask=mask, context_mask=context_mask, pair_mask=pair_mask, grid=grid)
        with torch.no_grad():
            x.add_(1.0)
        return y


@plant("tensor_in_tensor_out", "expected one tensor, got tuple")
class TwoOutputs(ToyAttention):
    def forward(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        y = super().forward(x, context, mask=mask, context_mask=context_mask, pair_mask=pair_mask, grid=grid)
        return y, y


@plant("single_token", "has NaN or infinite")
class DeviationOfOne(ToyAttention):
    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(mixed, x, mask) + (0.0 if self.causal else x.square().sum(dim=1, keepdim=True) / (x.shape[1] - 1))


@plant("grid_of_rank_one", "grid=None")
class GridIsAnother(ToyAttention):
    def forward(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        y = super().forward(x, context, mask=mask, context_mask=context_mask, pair_mask=pair_mask, grid=grid)
        return y if grid is None else 2.0 * y
