"""Lightning attention: causal linear attention with a fixed decay per head, in linear time and constant state."""

from __future__ import annotations

from typing import Any

import torch
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
from attnlab.mixers.parts.decay import log_decay
from attnlab.mixers.parts.lrpe import LRPE
from attnlab.mixers.parts.norms import simple_rms_norm
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.linear_attention import linear_attention

CAUSAL_STATE = Supports(
    causal="always", streaming=True, mixing_matrix=True, state="bounded", associative=True, dynamics=True, cost=1.0
)
_ACTIVATIONS = {"none": nn.Identity, "silu": nn.SiLU, "elu": nn.ELU, "relu": nn.ReLU}


@mixers.register("lightning", family="linear", paper="lightning-attention-2", supports=CAUSAL_STATE)
class LightningAttention(StreamingMixer):
    r"""Decayed linear attention (Qin et al. 2024, Lightning Attention-2, equations 5 to 9).

    With decay $\lambda_h = e^{-s_h}$ of head h, and no scale, feature map or denominator in the operator,

    $$o_i = \sum_{j \le i} \lambda^{i-j} (q_i^\top k_j)\, v_j, \qquad y = W_o\,\mathrm{SRMSNorm}(\mathrm{concat}_h\, o)$$

    Time O(n d^2), memory O(n d): chunks, no n x n map. The norm over the width, of each token alone, takes the place of the
    denominator. State: ``sum`` (b, h, d, e) in float32 or wider, and ``position`` (b,).

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always True.
        activation: of queries and keys: "none", "silu", "elu" or "relu".
        gate: multiply the normalised output by another linear map of the input (TransNormerLLM), with no activation.
        lrpe: linearised relative position features, which double the width of queries and keys.
        decay: "alibi" slopes, or "none".
        layer: index of the layer, which scales the decay.
        num_layers: layers of the model; 1 leaves the slopes as they are.
        qkv_bias: biases in the input projections.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an unknown activation or decay, or a layer outside the model.

    Differs from the paper: which is about the operator; the layer around it is the simplest of its authors' models.
    """

    memory = ("sum",)
    log_decay: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = True,
        activation: str = "none",
        gate: bool = False,
        lrpe: bool = False,
        decay: str = "alibi",
        layer: int = 0,
        num_layers: int = 1,
        qkv_bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(_ACTIVATIONS)}, got {activation!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_dim = dim // num_heads
        self.gated = gate
        self.in_proj = nn.Linear(dim, (4 if gate else 3) * dim, bias=qkv_bias, **place)
        self.out_proj = nn.Linear(dim, dim, bias=False, **place)
        self.activation = _ACTIVATIONS[activation]()
        self.lrpe = LRPE(num_heads, self.head_dim, **place) if lrpe else None
        decays = log_decay(decay, num_heads, layer, num_layers)
        self.register_buffer("log_decay", None if decays is None else decays.to(device), persistent=False)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty sum at position 0."""
        width = self.head_dim * (1 if self.lrpe is None else 2)
        shape = (batch_size, self.num_heads, width, self.head_dim)
        return State(
            {
                "sum": torch.zeros(shape, device=device, dtype=accumulate_dtype(dtype)),
                "position": torch.zeros(batch_size, device=device, dtype=torch.int64),
            }
        )

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Project, add to the decayed sum and read, normalise, gate, project back."""
        q, k, v, u = self._project(x, mask, state["position"])
        heads, total = linear_attention(q, k, v, log_decay=self.log_decay, initial_state=state["sum"])
        self.emit("values", v)
        self.emit("mixed", heads)
        y = simple_rms_norm(rearrange(heads, "b h n e -> b n (h e)"))
        y = self.out_proj(y if u is None else u * y)
        return y, State({"sum": total, "position": state["position"] + x.shape[1]})

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What the operator makes of identity values."""
        q, k, v, _ = self._project(x, masks.query, torch.zeros(x.shape[0], device=x.device, dtype=torch.int64))
        identity = torch.eye(x.shape[1], device=x.device, dtype=v.dtype).expand(*v.shape[:2], -1, -1)
        return linear_attention(q, k, identity, log_decay=self.log_decay)[0]

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        """The decayed sum over the piece, and what is left of an earlier one: ``carry`` (b, h, 1, 1)."""
        _, k, v, _ = self._project(x, mask, state["position"])
        decays = x.new_zeros(self.num_heads) if self.log_decay is None else self.log_decay.to(x.dtype)
        left = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)  # tokens that come after this one
        carry = (decays * x.shape[1]).exp()[:, None, None].expand(x.shape[0], -1, 1, 1)
        return State({"sum": (k * (decays[:, None] * left).exp().unsqueeze(-1)).mT @ v, "carry": carry})

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """What the later piece leaves of the earlier sum, and its own."""
        carried = {"carry": earlier["carry"] * later["carry"]} if "carry" in earlier else {}
        return {"sum": earlier["sum"] * later["carry"] + later["sum"], **carried}

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """Every entry of the state decays alike, padding too."""
        q, k, _, _ = self._project(x, mask, torch.zeros(x.shape[0], device=x.device, dtype=torch.int64))
        decays = x.new_zeros(self.num_heads) if self.log_decay is None else self.log_decay.to(x.dtype)
        return Dynamics(decays.exp()[:, None, None].expand_as(k), k, q)

    def _project(
        self, x: Tensor, mask: Tensor | None, start: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "b n c"] | None]:
        parts = self.in_proj(x).chunk(4 if self.gated else 3, dim=-1)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in parts[:3])
        q, k = self.activation(q), self.activation(k)
        if self.lrpe is not None:
            index = start[:, None] + torch.arange(x.shape[1], device=x.device)
            q, k = self.lrpe(q, index), self.lrpe(k, index)
        if mask is not None:
            k = k.masked_fill(~mask[:, None, :, None], 0.0)
        return q, k, v, parts[3] if self.gated else None
