"""DeltaNet: linear attention whose write corrects what the state already holds under the key."""

from __future__ import annotations

from collections.abc import Callable
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
from attnlab.mixers.parts.decay import StepDecay
from attnlab.mixers.parts.features import elu_plus_one
from attnlab.mixers.parts.norms import l2_normalize, sum_normalize
from attnlab.mixers.parts.short_convolution import ShortConvolution
from attnlab.mixers.parts.steps import Steps, carry
from attnlab.ops.backends import accumulate_dtype


def _identity(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": torch.relu,
    "elu": elu_plus_one,
    "identity": _identity,
}
_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"l2": l2_normalize, "sum": sum_normalize}


@mixers.register(
    "delta_net",
    family="linear",
    paper="deltanet",
    supports=Supports(
        causal="always", streaming=True, mixing_matrix=True, state="bounded", associative=True, dynamics=True, cost=1.0
    ),
)
class DeltaNet(StreamingMixer):
    r"""The delta rule over the sequence (Yang et al. 2024, equations 1 to 10).

    For one head with state $S \in \mathbb{R}^{K \times V}$ and write strength $\beta_t$,

    $$S_t = S_{t-1} + \beta_t k_t (v_t - S_{t-1}^\top k_t)^\top, \qquad o_t = K^{-1/2} S_t^\top q_t$$

    q, k, v are linear maps of x through a short causal convolution and an activation (v: SiLU), q and k normalised over the head;
    $\beta = \sigma(W_b x)$; outputs pass an RMS norm a head, a gate if chosen, and $W_o$. No biases. Time O(n C d + n d^2 / h)
    in chunks of C, memory O(n d). State: ``memory`` (b, h, K, V) in float32 or wider, and the windows of the convolutions.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always True.
        expand_k: K h / dim, width of all keys together relative to dim.
        expand_v: V h / dim.
        conv_size: taps of the short convolutions; 0 for none.
        beta: "sigmoid", or "one" for a write strength of 1.
        negative_eigenvalues: double beta, so that transitions reach -1 along a key.
        gate: multiply the normalised output by SiLU of another linear map of x.
        decay: multiply the state before each step by $e^{-A\Delta_t}$, one number a head with
            $\Delta_t = \mathrm{softplus}(w^\top x_t + b)$ (the gated delta rule, Yang et al. 2024, arXiv 2412.06464).
        qk_activation: "silu", "relu", "elu" (plus 1) or "identity".
        qk_norm: "l2", or "sum" (divide by the sum of the entries).
        norm_eps: of the output norm.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an unknown option value, or widths that the heads do not divide.

    Differs from the paper: a masked token has beta 0 and enters the convolutions as zero, so that padding writes nothing.
    """

    memory = ("memory",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = True,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_size: int = 4,
        beta: str = "sigmoid",
        negative_eigenvalues: bool = False,
        gate: bool = False,
        decay: bool = False,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        self.lookback = max(conv_size - 1, 0)
        for name, value, known in (
            ("qk_activation", qk_activation, list(_ACTIVATIONS)),
            ("qk_norm", qk_norm, list(_NORMS)),
            ("beta", beta, ["sigmoid", "one"]),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        keys, values = round(dim * expand_k), round(dim * expand_v)
        for name, width in (("expand_k", keys), ("expand_v", values)):
            if width < 1 or width % num_heads:
                raise ValueError(f"{name}: expected dim * {name} to be a positive multiple of num_heads={num_heads}, got {width}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scale_beta = 2.0 if negative_eigenvalues else 1.0
        self.qk_activation, self.qk_norm, self.norm_eps = qk_activation, qk_norm, norm_eps
        self.key_dim, self.value_dim = keys // num_heads, values // num_heads
        self.q_proj = nn.Linear(dim, keys, bias=False, **place)
        self.k_proj = nn.Linear(dim, keys, bias=False, **place)
        self.v_proj = nn.Linear(dim, values, bias=False, **place)
        self.b_proj = nn.Linear(dim, num_heads, bias=False, **place) if beta == "sigmoid" else None
        self.g_proj = nn.Linear(dim, values, bias=False, **place) if gate else None
        self.decay = StepDecay(dim, num_heads, **place) if decay else None
        self.out_proj = nn.Linear(values, dim, bias=False, **place)
        self.out_norm = nn.RMSNorm(self.value_dim, eps=norm_eps, **place)
        widths = {"q": keys, "k": keys, "v": values} if conv_size else {}
        self.convs = nn.ModuleDict({name: ShortConvolution(width, conv_size, **place) for name, width in widths.items()})

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty memory and empty windows."""
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        windows = {f"window_{name}": conv.begin(batch_size, device, dtype) for name, conv in self._named_convs()}
        return State({"memory": torch.zeros(shape, device=device, dtype=accumulate_dtype(dtype)), **windows})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Write every token into the memory and read it."""
        steps, windows = self._project(x, state, mask)
        heads, memory = steps.run(state["memory"])
        self.emit("values", steps.v)
        self.emit("mixed", heads)
        self.emit("beta", lambda: steps.beta.squeeze(-1))  # type: ignore[union-attr]
        y = self.out_norm(heads.transpose(1, 2).to(self.out_norm.weight.dtype))
        if self.g_proj is not None:
            y = y * F.silu(rearrange(self.g_proj(x), "b n (h e) -> b n h e", h=self.num_heads))
        return self.out_proj(y.flatten(2)), State({"memory": memory, **windows})

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What the operator makes of identity values: Householder-like products between write and read."""
        steps, _ = self._project(x, self.begin(x.shape[0], x.device, x.dtype), masks.query)
        identity = torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(*steps.v.shape[:2], -1, -1)
        return steps._replace(v=identity).run()[0]

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        r"""A piece maps $S \mapsto P S + R$: R is the memory from zero, P (b, h, K, K) the identity's without values."""
        written, kept = self._project(x, state, mask)[0].digest()
        return State({"memory": written, "carry": kept})

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """The later piece's map of the earlier memory; maps are composed."""
        carried = {"carry": carry(later["carry"], earlier["carry"])} if "carry" in earlier else {}
        return {"memory": carry(later["carry"], earlier["memory"]) + later["memory"], **carried}

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        r"""$\Lambda_t = I - \beta_t k_t k_t^\top$, by the decay if there is one: a product of Householder-like factors."""
        return self._project(x, self.begin(x.shape[0], x.device, x.dtype), mask)[0].recurrence()

    def _named_convs(self) -> list[tuple[str, ShortConvolution]]:
        return [(name, conv) for name, conv in self.convs.items() if isinstance(conv, ShortConvolution)]

    def _project(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Steps, dict[str, Tensor]]:
        parts = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        windows = {}
        for name, conv in self._named_convs():
            parts[name], windows[f"window_{name}"] = conv(parts[name], state[f"window_{name}"])
        parts["v"] = F.silu(parts["v"])
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in parts.values())
        activate, normalize = _ACTIVATIONS[self.qk_activation], _NORMS[self.qk_norm]
        q, k = normalize(activate(q)), normalize(activate(k))
        beta = torch.ones_like(x[..., : self.num_heads]) if self.b_proj is None else self.b_proj(x).sigmoid()
        beta = (beta * self.scale_beta).transpose(1, 2).unsqueeze(-1)
        decay = None if self.decay is None else self.decay(x)
        return Steps(q, k, v, decay, beta, self.key_dim**-0.5).masked(mask), windows
