"""Linear attention with a choice of decays: learned, of the token, a head's or a channel's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.dynamics import Dynamics
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.parts.decay import ChannelDecay, LearnedDecay, StepDecay
from attnlab.mixers.parts.short_convolution import ShortConvolution
from attnlab.mixers.parts.steps import Steps, carry
from attnlab.ops.backends import accumulate_dtype

DECAYS = ("channel", "step", "learned_head", "learned_channel")
ACTIVATIONS = {"none": nn.Identity(), "silu": nn.SiLU(), "relu": nn.ReLU(), "elu": nn.ELU()}


@mixers.register(
    "gated_linear",
    family="linear",
    supports=Supports(
        causal="always", streaming=True, mixing_matrix=True, state="bounded", associative=True, dynamics=True, cost=1.0
    ),
)
class GatedLinearAttention(StreamingMixer):
    r"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635, equations 3 and 4), and its relatives by their decays.

    For one head with decays $a_t \in (0, 1]$, a vector over the keys' channels or one number,

    $$S_t = \mathrm{diag}(a_t) S_{t-1} + k_t v_t^\top, \qquad o_t = d^{-1/2} S_t^\top q_t, \qquad
      y = W_o (\mathrm{RMSNorm}(o) \odot \mathrm{SiLU}(W_g x))$$

    ``decay`` says what $a_t$ is: "channel" $\sigma(W_2 W_1 x_t + b)^{1/16}$ (gated linear attention); "step" $e^{-A \Delta_t}$ a
    head, $\Delta_t = \mathrm{softplus}(w^\top x_t + b)$, which weighs the write too, $k_t \Delta_t$ (the state-space dual of
    Mamba-2, Dao and Gu 2024, arXiv 2405.21060); "learned_head" and "learned_channel" a parameter (as in retention). Time
    O(n d^2), memory O(n d). State: ``sum`` (b, h, d, e) in float32 or wider, and the windows of the convolutions.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always True.
        decay: see above.
        expand_k: d h / dim.
        expand_v: e h / dim.
        conv_size: taps of short causal convolutions of q, k and v; 0 for none.
        activation: of q and k: "none", "silu", "relu" or "elu".
        gate: the factor SiLU(W_g x).
        norm_eps: of the output norm.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an unknown option value, or widths that the heads do not divide.

    Differs from the papers: a masked token neither writes nor decays.
    """

    memory = ("sum",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = True,
        decay: str = "channel",
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_size: int = 0,
        activation: str = "none",
        gate: bool = True,
        norm_eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        for name, value, known in (("decay", decay, DECAYS), ("activation", activation, tuple(ACTIVATIONS))):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        keys, values = round(dim * expand_k), round(dim * expand_v)
        for name, width in (("expand_k", keys), ("expand_v", values)):
            if width < 1 or width % num_heads:
                raise ValueError(f"{name}: expected dim * {name} to be a positive multiple of num_heads={num_heads}, got {width}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.key_dim, self.value_dim = keys // num_heads, values // num_heads
        self.activation = activation
        self.q_proj, self.k_proj = (nn.Linear(dim, keys, bias=False, **place) for _ in range(2))
        self.v_proj = nn.Linear(dim, values, bias=False, **place)
        self.g_proj = nn.Linear(dim, values, bias=False, **place) if gate else None
        self.out_proj = nn.Linear(values, dim, bias=False, **place)
        self.out_norm = nn.RMSNorm(self.value_dim, eps=norm_eps, **place)
        widths = {"q": keys, "k": keys, "v": values} if conv_size else {}
        self.convs = nn.ModuleDict({name: ShortConvolution(width, conv_size, **place) for name, width in widths.items()})
        self.lookback = max(0, conv_size - 1)
        self.decay: ChannelDecay | StepDecay | LearnedDecay
        if decay == "channel":
            self.decay = ChannelDecay(dim, num_heads, self.key_dim, **place)
        elif decay == "step":
            self.decay = StepDecay(dim, num_heads, **place)
        else:
            self.decay = LearnedDecay(num_heads, self.key_dim if decay == "learned_channel" else 1, **place)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty sum and empty windows."""
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        windows = {f"window_{name}": conv.begin(batch_size, device, dtype) for name, conv in self.convs.items()}  # type: ignore[operator]
        return State({"sum": torch.zeros(shape, device=device, dtype=accumulate_dtype(dtype)), **windows})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Decay, write, read; normalise, gate and project back."""
        steps, windows = self._project(x, state, mask)
        heads, total = steps.run(state["sum"])
        self.emit("values", steps.v)
        self.emit("mixed", heads)
        self.emit("log_decay", lambda: self.decay(x))
        y = self.out_norm(heads.transpose(1, 2).to(self.out_norm.weight.dtype)).flatten(2)
        y = y if self.g_proj is None else y * F.silu(self.g_proj(x))
        return self.out_proj(y), State({"sum": total, **windows})

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        """The decayed sum over the piece, and what is left of an earlier one."""
        written, kept = self._project(x, state, mask)[0].digest()
        return State({"sum": written, "carry": kept})

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """What the later piece leaves of the earlier sum, and its own."""
        carried = {"carry": carry(later["carry"], earlier["carry"])} if "carry" in earlier else {}
        return {"sum": carry(later["carry"], earlier["sum"]) + later["sum"], **carried}

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """The decays on the diagonal; keys enter, scaled queries read."""
        return self._project(x, self.begin(x.shape[0], x.device, x.dtype), mask)[0].recurrence()

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What the operator makes of identity values."""
        steps, _ = self._project(x, self.begin(x.shape[0], x.device, x.dtype), masks.query)
        identity = torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(*steps.v.shape[:2], -1, -1)
        return steps._replace(v=identity).run()[0]

    def _project(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Steps, dict[str, Tensor]]:
        parts = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        windows = {}
        for name, conv in self.convs.items():
            parts[name], windows[f"window_{name}"] = conv(parts[name], state[f"window_{name}"])
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in parts.values())
        activate = ACTIVATIONS[self.activation]
        q, k = activate(q), activate(k)
        if isinstance(self.decay, StepDecay):
            k = k * self.decay.steps(x)
        return Steps(q, k, v, self.decay(x), None, self.key_dim**-0.5).masked(mask), windows
