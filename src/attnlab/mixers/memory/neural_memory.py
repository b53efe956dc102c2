"""The neural long-term memory of Titans as a part: projections, gates, first weights, state."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.state import State
from attnlab.mixers.memory.real_tokens import align, recent
from attnlab.mixers.parts.norms import l2_normalize
from attnlab.mixers.parts.short_convolution import ShortConvolution
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.neural_memory import ACTIVATIONS, Alignment, MemoryState, neural_memory


class ConvolvedProjection(nn.Module):
    r"""$\mathrm{SiLU}(\mathrm{conv}(W x))$ cut into heads, over the width of a head of length 1 if wanted.

    The convolution runs over real tokens alone.

    Args:
        dim: width of the tokens, in and out.
        num_heads: heads.
        conv_size: taps; 0 for no convolution.
        normalize: whether each head's vector is brought to length 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        conv_size: int,
        *,
        normalize: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.normalize = num_heads, normalize
        self.proj = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.conv = ShortConvolution(dim, conv_size, device=device, dtype=dtype) if conv_size else None

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "b w1 c"]:
        """The state before the first token: zeros for the last inputs of the convolution."""
        if self.conv is None:
            return torch.zeros(batch_size, 0, self.proj.out_features, device=device, dtype=dtype)
        return self.conv.begin(batch_size, device, dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], window: Float[Tensor, "b w1 c"], aligned: Alignment | None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b w1 c"]]:
        """The heads, and the last inputs of the convolution; ``aligned`` holds the real tokens, None if all are."""
        y = self.proj(x)
        if self.conv is not None and aligned is None:
            y, window = self.conv(y, window)
        elif self.conv is not None and aligned is not None:
            y = aligned.spread(y[:, None])[:, 0]
            before, window = window, recent(window, y, aligned.count)
            y = aligned.collect(self.conv(y, before)[0][:, None])[:, 0]
        y = rearrange(F.silu(y), "b n (h d) -> b h n d", h=self.num_heads)
        return l2_normalize(y) if self.normalize else y, window


class NeuralMemory(nn.Module):
    r"""A memory network a head, written and read token by token (`attnlab.ops.neural_memory`).

    Each of $q, k, v$ is a `ConvolvedProjection` of x, q and k of length 1; the gates of a head are

    $$\alpha_t = \sigma(w_\alpha^\top x_t + b_\alpha), \qquad \eta_t = \sigma(w_\eta^\top x_t + b_\eta), \qquad
    \theta_t = \theta_{\max}\, \sigma(w_\theta^\top x_t + b_\theta) .$$

    No weights at all are a fixed point of two or more layers, whose gradients contain one another: where more is forgotten than
    written such a memory fades and does not come back, so alpha begins near 0.

    State: ``memory.l``, ``momentum.l`` and ``anchor.l`` (b, h, in, out) a layer l in float32 or wider, ``place`` (b,), and the
    windows of the convolutions.

    Args:
        dim: width of the tokens.
        num_heads: heads, each with its own memory; 1 is one memory for the whole width.
        depth: L, layers of the memory, 1 to 4; 1 is a matrix.
        expansion: width of the hidden layers relative to that of a head.
        chunk: tokens that share the memory at which gradients are taken; 1 is the recurrence itself.
        conv_size: taps of the short convolutions; 0 for none.
        activation: between the memory's layers: "silu", "gelu" or "tanh".
        momentum: whether eta is there; without it the past surprise is forgotten at once.
        forgetting: whether alpha is there.
        max_step: theta_max; by default 1 / chunk, so that the gradients that a chunk takes at one point add up to a step.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        depth: int = 2,
        expansion: float | int = 2.0,
        chunk: int = 64,
        conv_size: int = 4,
        activation: str = "silu",
        momentum: bool = True,
        forgetting: bool = True,
        max_step: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim = dim // num_heads
        hidden = round(head_dim * expansion)
        if not 1 <= depth <= 4:
            raise ValueError(f"depth: expected 1 to 4 layers, got {depth}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {list(ACTIVATIONS)}, got {activation!r}")
        for name, value, least in (("chunk", chunk, 1), ("conv_size", conv_size, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if hidden < 1:
            raise ValueError(f"expansion: expected hidden layers of at least 1 for a head of {head_dim}, got {expansion}")
        if max_step is not None and max_step <= 0:
            raise ValueError(f"max_step: expected a positive number, got {max_step}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.chunk, self.activation = num_heads, chunk, activation
        self.momentum, self.forgetting = momentum, forgetting
        self.max_step = 1.0 / chunk if max_step is None else max_step
        self.q = ConvolvedProjection(dim, num_heads, conv_size, normalize=True, **place)
        self.k = ConvolvedProjection(dim, num_heads, conv_size, normalize=True, **place)
        self.v = ConvolvedProjection(dim, num_heads, conv_size, normalize=False, **place)
        # At first hardly anything is forgotten, half of the surprise is kept, and a chunk's steps add up to less than one.
        starts = {"theta": 0.25, **({"alpha": 3e-4} if forgetting else {}), **({"eta": 0.5} if momentum else {})}
        self.gates = nn.ModuleDict({name: nn.Linear(dim, num_heads, **place) for name in starts})
        for name, start in starts.items():
            nn.init.constant_(self.gates[name].bias, math.log(start / (1.0 - start)))  # type: ignore[arg-type]
        widths = [head_dim, *[hidden] * (depth - 1), head_dim]
        self.layers = nn.ParameterList(
            nn.Parameter(torch.empty(num_heads, before, after, **place).normal_(std=before**-0.5))
            for before, after in pairwise(widths)
        )

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The learned first memory, no momentum, empty windows."""
        wide = accumulate_dtype(dtype)
        memory = tuple(w.to(device, wide).expand(batch_size, *w.shape) for w in self.layers)
        windows = {f"window_{name}": self._projection(name).begin(batch_size, device, dtype) for name in "qkv"}
        place = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return pack(MemoryState.fresh(memory)._replace(place=place), windows)

    def forward(
        self, x: Float[Tensor, "b n c"], state: State, mask: Bool[Tensor, "b n"] | None, place: int | None = None
    ) -> tuple[Float[Tensor, "b h n d"], State]:
        """What every token reads after it was written, and the state after the last.

        Args:
            x: tokens, zero where masked.
            state: what `begin` or the last call returned.
            mask: True marks a real token; the others are as if they were not there.
            place: the place in the chunk where it is known to be the same for all, which saves looking.
        """
        aligned = align(mask)
        parts, windows = {}, {}
        for name in "qkv":
            parts[name], windows[f"window_{name}"] = self._projection(name)(x, state[f"window_{name}"], aligned)
        gates = {name: gate(x).sigmoid().transpose(1, 2) for name, gate in self.gates.items()}
        nothing = torch.zeros_like(gates["theta"])
        before = unpack(state)
        heads, after = neural_memory(
            *(parts["q"], parts["k"], parts["v"]),
            gates.get("alpha", nothing),
            gates.get("eta", nothing),
            self.max_step * gates["theta"],
            before if place is None else before._replace(place=place),
            chunk=self.chunk,
            activation=self.activation,
            mask=mask,
        )
        if isinstance(after.place, int):
            after = after._replace(place=torch.full_like(state["place"], after.place))
        return heads, pack(after, windows)

    def _projection(self, name: str) -> ConvolvedProjection:
        part = getattr(self, name)
        if not isinstance(part, ConvolvedProjection):
            raise TypeError(f"{name}: expected a ConvolvedProjection, got {type(part).__name__}")
        return part


def pack(memory: MemoryState, windows: dict[str, Tensor]) -> State:
    """The state of a mixer with the tensors of a memory."""
    names = ("memory", "momentum", "anchor")
    weights = {f"{name}.{i}": w for name, group in zip(names, memory[:3], strict=True) for i, w in enumerate(group)}
    place = memory.place
    if isinstance(place, int):
        raise TypeError(f"place: expected a tensor in a state, got {place}")
    return State({**weights, "place": place, **windows})


def unpack(state: State) -> MemoryState:
    """The inverse of `pack`."""
    depth = sum(name.startswith("memory.") for name in state)
    memory, momentum, anchor = (tuple(state[f"{name}.{i}"] for i in range(depth)) for name in ("memory", "momentum", "anchor"))
    return MemoryState(memory, momentum, anchor, state["place"])
