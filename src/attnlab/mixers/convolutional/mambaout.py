"""Gated convolution: the Mamba block without its state space, and with it where that is wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.parts.selective_ssm import SelectiveSSM
from attnlab.mixers.parts.short_convolution import ShortConvolution

_ACTIVATIONS = {"none": nn.Identity, "gelu": nn.GELU, "silu": nn.SiLU}
_CONVOLUTIONS = (F.conv1d, F.conv2d)


@mixers.register(
    "mambaout",
    family="convolutional",
    paper="mambaout",
    supports=Supports(causal="optional", streaming=True, grid=frozenset({1, 2}), state="bounded", cost=1.0),
    example={"kernel_size": 3},
)
class MambaOut(StreamingMixer):
    r"""Gated CNN (Yu and Wang 2024, section 3.3; after Dauphin et al. 2017), for tokens and channels in one.

    With h = floor(expansion c) hidden channels, of which e = floor(conv_ratio c) are convolved,

    $$[g, i, u] = W_1 x + b_1, \qquad y = W_2 (\sigma(g) \odot [\,i\,;\ \mathrm{SSM}(\phi(\mathrm{DWConv}_k\, u))\,]) + b_2$$

    with g (n, h), i (n, h - e), u (n, e). The authors have $\sigma$ = GELU, $\phi$ = identity and no SSM. `mamba` is the causal
    form with ``activation="silu", conv_activation="silu", ssm=True, bias=False``, conv_ratio = expansion and k = 4.

    Time O(n c h + n k^r e), memory O(n h). Not causal, the convolution is centred, on a grid of rank r or with its last axis
    along a sequence. Causal, it has k taps along the tokens in their order, also on a grid; the state is ``window``
    (b, k - 1, e), and ``ssm`` as in `mamba`. Masked tokens are zeros to the convolution, and do not move the SSM.

    Args:
        dim: width of the tokens, c.
        num_heads: of the common signature; the mechanism has no heads.
        causal: see above.
        expansion: h / c.
        conv_ratio: e / c, at most h / c.
        kernel_size: k, odd where not causal.
        rank: r of the convolution where not causal, 1 or 2.
        activation: $\sigma$: "gelu", "silu" or "none".
        conv_activation: $\phi$, one of these.
        ssm: the slot of the state space, which runs along the tokens in their order.
        ssm_options: options of `attnlab.mixers.parts.selective_ssm.SelectiveSSM`; by default 16 states and rank c / 16.
        bias: biases of the linear maps.
        conv_bias: bias of the convolution.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for sizes that leave no channel, an even centred kernel, a rank other than 1 and 2, or an unknown activation.
        UnsupportedError: for a grid of rank 2 with ``rank=1``.

    Differs from the paper: the norm before and the residual around it are the block's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        expansion: float | int = 8 / 3,
        conv_ratio: float | int = 1.0,
        kernel_size: int = 7,
        rank: int = 2,
        activation: str = "gelu",
        conv_activation: str = "none",
        ssm: bool = False,
        ssm_options: Mapping[str, Any] | None = None,
        bias: bool = True,
        conv_bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        hidden, convolved = int(expansion * dim), int(conv_ratio * dim)
        if not 1 <= convolved <= hidden:
            raise ValueError(f"expansion, conv_ratio: expected 1 <= convolved <= hidden channels, got {convolved} and {hidden}")
        if kernel_size < 1 or (kernel_size % 2 == 0 and not causal):
            raise ValueError(f"kernel_size: expected at least 1, and odd where not causal, got {kernel_size}")
        if rank not in (1, 2):
            raise ValueError(f"rank: expected 1 or 2, got {rank}")
        for name, chosen in (("activation", activation), ("conv_activation", conv_activation)):
            if chosen not in _ACTIVATIONS:
                raise ValueError(f"{name}: expected one of {sorted(_ACTIVATIONS)}, got {chosen!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.sizes, self.ranks = [hidden, hidden - convolved, convolved], frozenset(range(1, rank + 1))
        self.in_proj = nn.Linear(dim, 2 * hidden, bias=bias, **place)
        self.activation, self.conv_activation = _ACTIVATIONS[activation](), _ACTIVATIONS[conv_activation]()
        self.conv = (
            ShortConvolution(convolved, kernel_size, bias=conv_bias, **place)
            if causal
            else CenteredConvolution(convolved, kernel_size, rank=rank, bias=conv_bias, **place)
        )
        self.ssm = SelectiveSSM(**_ssm_options(dim, convolved, ssm_options), **place) if ssm else None
        self.out_proj = nn.Linear(hidden, dim, bias=bias, **place)
        for layer in (self.in_proj, self.conv, self.out_proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @property
    def supports(self) -> Supports:
        """Grids of the ranks that its kernels have."""
        return replace(self.info.supports, grid=getattr(self, "ranks", self.info.supports.grid))

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty window, and zero states where there is an SSM."""
        states = {"window": cast("ShortConvolution", self.conv).begin(batch_size, device, dtype)}
        if self.ssm is not None:
            states["ssm"] = self.ssm.begin(batch_size, device, dtype)
        return State(states)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Convolve from the window on, and scan from the states on."""
        gate, kept, inner = self._project(x, mask)
        inner, window = self.conv(inner, state["window"])
        inner, ssm = self._scan(inner, state.get("ssm"), mask)
        return self._gated(gate, kept, inner), state.replace(window=window, **({} if ssm is None else {"ssm": ssm}))

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """The causal form is one piece; the other convolves on the grid."""
        if self.causal:
            return super().mix(x, context, masks, grid)
        gate, kept, inner = self._project(x, masks.query)
        inner, _ = self._scan(self.conv(inner, grid), None, masks.query)
        return self._gated(gate, kept, inner)

    def _project(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        gate, kept, inner = self.in_proj(x).split(self.sizes, dim=-1)
        return gate, kept, zero_masked(inner, mask)  # with a bias the projection of a zero is not zero

    def _scan(self, inner: Tensor, state: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        inner = self.conv_activation(inner)
        return (inner, None) if self.ssm is None else self.ssm(zero_masked(inner, mask), state, mask)

    def _gated(self, gate: Tensor, kept: Tensor, inner: Tensor) -> Tensor:
        gate = self.activation(gate)
        self.emit("gates", gate)
        return self.out_proj(gate * torch.cat((kept, inner), dim=-1))


class CenteredConvolution(nn.Module):
    """A depthwise convolution on a grid, each token in the middle of its kernel, zeros around the grid.

    Args:
        channels: e.
        size: side of the kernel, odd.
        rank: axes of the kernel, 1 or 2; a sequence is a grid of height 1 for rank 2.
        bias: one number a channel.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        rank: int,
        bias: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, *(size,) * rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Float[Tensor, "b n e"], grid: Grid) -> Float[Tensor, "b n e"]:
        """The convolved tokens."""
        rank = self.weight.ndim - 2
        image = to_grid(x, (1,) * (rank - len(grid)) + tuple(grid))
        side, channels = self.weight.shape[-1], x.shape[2]
        return from_grid(_CONVOLUTIONS[rank - 1](image, self.weight, self.bias, padding=side // 2, groups=channels))


def long_sequence_ratio(num_tokens: int, dim: int) -> float:
    r"""$N / (6 D)$: what in a Transformer block is quadratic in N tokens, against what is linear (section 3.2).

    The block has 24 D^2 N + 4 D N^2 multiplications and additions. Beyond 1 the authors call the task one of long sequences, for
    which the fixed memory of a state space pays: at D = 384 from 2304 tokens.

    Raises:
        ValueError: if one of them is not positive.
    """
    if num_tokens < 1 or dim < 1:
        raise ValueError(f"num_tokens, dim: expected positive integers, got {num_tokens} and {dim}")
    return num_tokens / (6 * dim)


def _ssm_options(dim: int, channels: int, options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"channels": channels, "state_dim": 16, "dt_rank": math.ceil(dim / 16), **(options or {})}
