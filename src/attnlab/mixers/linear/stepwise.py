"""What layers around a linear recurrence share: projections, short convolutions, the state, an output norm and a gate."""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.dynamics import Dynamics
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.parts.short_convolution import ShortConvolution
from attnlab.mixers.parts.steps import Steps, carry
from attnlab.ops.backends import accumulate_dtype

STEPWISE = Supports(
    causal="always", streaming=True, mixing_matrix=True, state="bounded", associative=True, dynamics=True, cost=1.0
)
"""What linear recurrences promise."""


class StepwiseOptions(TypedDict, total=False):
    """The options of `StepwiseMixer` that a subclass hands on unchanged."""

    causal: bool
    expand_k: float
    expand_v: float
    norm_eps: float
    device: torch.device | None
    dtype: torch.dtype | None


class StepwiseMixer(StreamingMixer):
    r"""$y = W_o(\mathrm{RMSNorm}(o) \odot \mathrm{SiLU}(W_g x))$ around the outputs o of a recurrence, without biases.

    A subclass makes each token's `Steps` of the projected and convolved q, k and v. State: ``memory`` (b, h, d, e) in float32 or
    wider, and the windows of the convolutions.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always True.
        expand_k: d h / dim, width of all keys together relative to dim.
        expand_v: e h / dim.
        conv_size: taps of the short causal convolutions of q, k and v; 0 for none.
        gate: the factor $\mathrm{SiLU}(W_g x)$.
        norm_eps: of the output norm.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for widths that the heads do not divide.
    """

    memory = ("memory",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        conv_size: int,
        gate: bool,
        causal: bool = True,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        norm_eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        keys, values = round(dim * expand_k), round(dim * expand_v)
        for name, width in (("expand_k", keys), ("expand_v", values)):
            if width < 1 or width % num_heads:
                raise ValueError(f"{name}: expected dim * {name} to be a positive multiple of num_heads={num_heads}, got {width}")

        def linear(inside: int, outside: int) -> nn.Linear:
            return nn.Linear(inside, outside, bias=False, device=device, dtype=dtype)

        self.key_dim, self.value_dim = keys // num_heads, values // num_heads
        self.q_proj, self.k_proj, self.v_proj = linear(dim, keys), linear(dim, keys), linear(dim, values)
        self.g_proj = linear(dim, values) if gate else None
        self.out_proj = linear(values, dim)
        self.out_norm = nn.RMSNorm(self.value_dim, eps=norm_eps, device=device, dtype=dtype)
        widths = {"q": keys, "k": keys, "v": values} if conv_size else {}
        convs = {name: ShortConvolution(width, conv_size, device=device, dtype=dtype) for name, width in widths.items()}
        self.convs = nn.ModuleDict(convs)
        self.lookback = max(conv_size - 1, 0)

    def steps(
        self, x: Float[Tensor, "b n c"], q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"]
    ) -> Steps:
        """What the tokens do, of their heads' projections; those that are masked are left out later."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement steps")

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty memory and empty windows."""
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        windows = {f"window_{name}": conv.begin(batch_size, device, dtype) for name, conv in self._named_convs()}
        return State({"memory": torch.zeros(shape, device=device, dtype=accumulate_dtype(dtype)), **windows})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Run the recurrence over every token; normalise, gate and project back."""
        steps, windows = self._project(x, state, mask)
        heads, memory = steps.run(state["memory"])
        self.emit("values", steps.v)
        self.emit("mixed", heads)
        if steps.beta is not None:
            self.emit("beta", steps.beta.squeeze(-1))
        if steps.log_decay is not None:
            self.emit("log_decay", steps.log_decay)
        y = self.out_norm(heads.transpose(1, 2).to(self.out_norm.weight.dtype)).flatten(2)
        y = y if self.g_proj is None else y * F.silu(self.g_proj(x))
        return self.out_proj(y), State({"memory": memory, **windows})

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What the recurrence makes of identity values."""
        steps = self._whole(x, masks.query)
        identity = torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(*steps.v.shape[:2], -1, -1)
        return steps._replace(v=identity).run()[0]

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        r"""A piece maps $S \mapsto P S + R$: R is the memory from zero, P (b, h, d, d), or its diagonal, the ``carry``."""
        written, kept = self._project(x, state, mask)[0].digest()
        return State({"memory": written, "carry": kept})

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """The later piece's map of the earlier memory; maps are composed."""
        carried = {"carry": carry(later["carry"], earlier["carry"])} if "carry" in earlier else {}
        return {"memory": carry(later["carry"], earlier["memory"]) + later["memory"], **carried}

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """The recurrence's own matrices."""
        return self._whole(x, mask).recurrence()

    def _whole(self, x: Tensor, mask: Tensor | None) -> Steps:
        return self._project(x, self.begin(x.shape[0], x.device, x.dtype), mask)[0]

    def _project(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Steps, dict[str, Tensor]]:
        parts = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        windows = {}
        for name, conv in self._named_convs():
            parts[name], windows[f"window_{name}"] = conv(parts[name], state[f"window_{name}"])
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in parts.values())
        return self.steps(x, q, k, v).masked(mask), windows

    def _named_convs(self) -> list[tuple[str, ShortConvolution]]:
        return [(name, conv) for name, conv in self.convs.items() if isinstance(conv, ShortConvolution)]
