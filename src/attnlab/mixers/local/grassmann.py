"""Grassmann flows: each token and one before it span a plane, whose coordinates are blended with the token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.info import Supports
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.ops.backends import accumulate_dtype


@mixers.register(
    "grassmann",
    family="local",
    paper="grassmann-flows",
    supports=Supports(causal="always", streaming=True, state="bounded", cost=1.0),
    example={"reduced_dim": 4, "offsets": (1, 3)},
)
class GrassmannFlow(StreamingMixer):
    r"""Causal Grassmann mixing ("Attention Is Not What You Need", 2025, arXiv 2512.19428), without attention.

    With tokens $h_t \in \mathbb{R}^c$, $z_t = W_r h_t + b_r \in \mathbb{R}^r$, and those offsets $\delta$ for which token
    $t - \delta$ exists, $\Delta_t$, the Pluecker coordinates of the plane of $z_t$ and $z_{t-\delta}$ are

    $$p_{ij} = z_{t,i}\, z_{t-\delta,j} - z_{t,j}\, z_{t-\delta,i} \ (i < j), \quad \hat p = p / \max(\lVert p \rVert, \epsilon)$$
    $$g_t = \frac{1}{|\Delta_t|} \sum_{\delta \in \Delta_t} (W_p\, \hat p^{(\delta)} + b_p), \quad
      a_t = \sigma(W_g [h_t; g_t] + b_g), \quad y_t = \mathrm{LN}(a_t \odot h_t + (1 - a_t) \odot g_t)$$

    and $g_t = 0$ where $\Delta_t$ is empty. Time O(n (|Delta| r + r^2 c)), memory O(n (c + r^2)): the coordinates are linear in
    either token, so that the mean needs the norms of all planes, $\lVert z_t \rVert$ times the part of $z_{t-\delta}$ at right
    angles to it, and then the coordinates of one.

    Offsets count places, masked ones too; a masked token is in no pair. State: the last max(delta) reduced tokens, ``window``
    (b, w, r), and which of them are there, ``real`` (b, w).

    Args:
        dim: width of the tokens, c.
        num_heads: of the common signature; the mechanism has no heads.
        causal: always True.
        reduced_dim: r, at least 2.
        offsets: the deltas, at least 1 each; one that is named twice counts twice.
        eps: $\epsilon$.
        norm_eps: of the LayerNorm.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for no offset or one below 1, or ``reduced_dim`` below 2.

    Differs from the paper: no official code is public; the form is that of a reproduction, which the vectors are from. Residual,
    norm before, and dropout are the block's. The blend is convex: where a is 1 the token passes unchanged. Where two reduced
    tokens are collinear the coordinates are 0 and gradients large, up to 1 / eps.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        reduced_dim: int = 32,
        offsets: Sequence[int] = (1, 2, 4, 8, 12, 16),
        eps: float = 1e-8,
        norm_eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if reduced_dim < 2:
            raise ValueError(f"reduced_dim: expected at least 2, got {reduced_dim}")
        if not offsets or min(offsets) < 1:
            raise ValueError(f"offsets: expected at least one, and each at least 1, got {tuple(offsets)}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.offsets, self.reduced_dim, self.eps = tuple(offsets), reduced_dim, eps
        self.reduce = nn.Linear(dim, reduced_dim, **place)
        self.encode = nn.Linear(reduced_dim * (reduced_dim - 1) // 2, dim, **place)
        self.gate = nn.Linear(2 * dim, dim, **place)
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **place)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No token before the first."""
        shape = (batch_size, max(self.offsets))
        window = torch.zeros(*shape, self.reduced_dim, device=device, dtype=dtype)
        return State({"window": window, "real": torch.zeros(shape, device=device, dtype=torch.bool)})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Reduce, encode the planes with earlier tokens, blend."""
        n, z = x.shape[1], self.reduce(x)
        here = torch.ones(x.shape[:2], device=x.device, dtype=torch.bool) if mask is None else mask
        known = torch.cat((state["window"].to(z.dtype), z), dim=1)
        real = torch.cat((state["real"], here), dim=1)
        planes, alone = self._mean_plane(z, known, real)
        flow = self.encode(planes.to(z.dtype)).masked_fill(alone, 0.0)
        gate = torch.sigmoid(self.gate(torch.cat((x, flow), dim=-1)))
        self.emit("gates", gate)
        y = self.norm(flow + gate * (x - flow))
        return y, State({"window": known[:, n:].clone(), "real": real[:, n:].clone()})

    def _mean_plane(
        self, z: Float[Tensor, "b n r"], known: Float[Tensor, "b m r"], real: Bool[Tensor, "b m"]
    ) -> tuple[Float[Tensor, "b n p"], Bool[Tensor, "b n 1"]]:
        """The mean of the normalised coordinates over valid offsets, and where there is none.

        ``known`` and ``real`` begin max(offsets) places before ``z``.
        """
        n, first = z.shape[1], known.shape[1] - z.shape[1]
        z, known = (t.to(accumulate_dtype(z.dtype)) for t in (z, known))
        square = (z * z).sum(-1, keepdim=True)
        length, safe = torch.linalg.vector_norm(z, dim=-1, keepdim=True), square.clamp(min=torch.finfo(z.dtype).tiny)
        others, count = torch.zeros_like(z), torch.zeros_like(square)
        for offset in self.offsets:
            earlier, valid = (t[:, first - offset : first - offset + n] for t in (known, real))
            # what is collinear with z has no part in the plane, and left in would drown the rest
            aside = earlier - (z * earlier).sum(-1, keepdim=True) / safe * z
            area = length * torch.linalg.vector_norm(aside, dim=-1, keepdim=True)
            pair = valid.unsqueeze(-1)
            others = others + (aside / area.clamp(min=self.eps)).masked_fill(~pair, 0.0)
            count = count + pair
        others = others / count.clamp(min=1.0)
        i, j = torch.triu_indices(self.reduced_dim, self.reduced_dim, 1, device=z.device)
        return z[..., i] * others[..., j] - z[..., j] * others[..., i], count == 0
