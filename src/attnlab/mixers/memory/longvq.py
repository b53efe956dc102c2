"""LongVQ: a gated hybrid of a state-space layer and attention whose keys are vector-quantised."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.memory.codebook import Codebook
from attnlab.mixers.memory.damped_ema import Structure
from attnlab.mixers.memory.vq_attention import vq_attention
from attnlab.ops.backends import accumulate_dtype


@mixers.register(
    "longvq",
    family="memory",
    paper="longvq",
    supports=Supports(causal="optional", streaming=True, mixing_matrix=True, state="bounded", discontinuous=True, cost=1.0),
    example={
        "codebook_size": 6,
        "window": 3,
        "key_dim": 32,
        "structure_dim": 2,
        "codebook_std": 0.5,
        "highway": False,
        "update": "manual",
    },
)
class LongVQ(StreamingMixer):
    r"""Attention to a codebook and a window, on top of a state-space layer (Liu et al. 2024). A RECONSTRUCTION.

    From the paper are: keys out of a state-space layer, quantised to the nearest codeword with a straight-through gradient, so
    that attention over the whole sequence needs a codebook of fixed length; a local window with a bias of its own; linear time;
    both directions or causal. The rest follows Mega (Ma et al. 2022) and Transformer-VQ (Lingle 2023). No equivalence with the
    authors' model is claimed.

    With $u = \mathrm{LN}(x)$, $a = \mathrm{SiLU}(\mathrm{SSM}(u))$, $z = \mathrm{SiLU}(W_z a + b_z)$, $q = \kappa_q \odot z +
    \mu_q$, $k = \kappa_k \odot z + \mu_k$, $v = \mathrm{SiLU}(W_v u)$, and $\hat k_j = k_j + \mathrm{sg}(C_{z_j} - k_j)$ with the
    nearest codeword $C_{z_j}$ out of S:

    $$o_i = \mathrm{softmax}_j\!\left(d^{-1/2} q_i^\top \hat k_j + B_{i-j}\right) v_j, \quad B_{i-j} = 0 \text{ if }|i-j| \ge w$$
    $$r = \mathrm{SiLU}(W_r a + b_r), \quad h = \mathrm{SiLU}(W_h a + U_h (r \odot o) + b_h), \quad f = \sigma(W_f a + b_f), \quad
      y = f \odot h + (1 - f) \odot x$$

    over all j, or j <= i where causal. Exact, in time O(n (S + w) d): keys beyond the window are summed by codeword. State:
    ``sums`` (b, h, S, e + 1) of values and counts of each codeword in float32 or wider, the w last ``keys``, ``values``,
    ``codes`` and ``real``, and ``structure``.

    With ``update="forward"`` `forward` in training mode moves the codebook on after it used it (`Codebook`); `extend` does not,
    nor does evaluation. `update_codebook` does so when it is called, the only way with ``update="manual"``: for recomputed passes
    (gradient checkpointing), which would count their keys twice.
    ``record`` collects "codes" (b, h, n) and "commitment_loss", $\beta$ times the mean of $\lVert k - \mathrm{sg}(C_z) \rVert^2$
    over real tokens, to be added to the loss.

    Args:
        dim: width of the tokens.
        num_heads: h; the authors' is 1. Each head has a codebook of its own.
        causal: j <= i.
        codebook_size: S of each head.
        window: w.
        key_dim: width of all heads' queries and keys together, a multiple of ``num_heads``.
        expand: width of the values over ``dim``.
        structure: the state-space layer, "ema" (damped moving averages) or "s4d"; both directions added unless causal.
        structure_dim: its states a channel.
        highway: whether $(1 - f) \odot x$ is there; a block with a residual path of its own may do without.
        decay: g of the codebook's averages.
        codebook_std: of the codewords before any key was seen.
        commitment: $\beta$.
        update: when the codebook learns, "forward" or "manual".
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for sizes that do not fit.

    Differs from the paper: beyond what is said above, the gradient of a score reaches its key within the window alone (further
    back keys are only known by their sums; the commitment loss reaches all). The pre-norm and the residual path are part of the
    mechanism's gate and stand in here. Codewords begin as small random vectors; `seed_codebook` draws them among the keys of a
    batch by k-means++. A masked token is passed over by the averages and keeps its place in the window.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        codebook_size: int = 256,
        window: int = 128,
        key_dim: int = 128,
        expand: int = 2,
        structure: str = "ema",
        structure_dim: int = 16,
        highway: bool = True,
        decay: float | int = 0.99,
        codebook_std: float | int = 0.02,
        commitment: float | int = 1e-4,
        update: str = "forward",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        for name, size in (("window", window), ("expand", expand)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if update not in ("forward", "manual"):
            raise ValueError(f"update: expected 'forward' or 'manual', got {update!r}")
        if commitment < 0:
            raise ValueError(f"commitment: expected a number of at least 0, got {commitment}")
        if key_dim < 1 or key_dim % num_heads:
            raise ValueError(f"key_dim: expected a multiple of num_heads={num_heads}, got {key_dim}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.window, self.commitment, self.highway, self.inner = window, commitment, highway, expand * dim
        self.learns = update == "forward"
        self.norm = nn.LayerNorm(dim, **place)
        self.structure = Structure(dim, structure_dim, structure, causal=causal, **place)
        self.key_proj = nn.Linear(dim, key_dim, **place)
        self.kappa = nn.Parameter(0.02 * torch.randn(2, key_dim, **place))
        self.mu = nn.Parameter(torch.zeros(2, key_dim, **place))
        self.value_proj = nn.Linear(dim, self.inner, bias=False, **place)
        self.codebook = Codebook(num_heads, codebook_size, key_dim // num_heads, decay=decay, std=codebook_std, **place)
        self.bias = nn.Parameter(torch.zeros(num_heads, window if causal else 2 * window - 1, **place))
        self.gates = nn.Linear(dim, self.inner + 2 * dim, **place)  # r, h, f
        self.out_proj = nn.Linear(self.inner, dim, bias=False, **place)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No sums, an empty window."""
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        heads = (batch_size, self.num_heads)
        _, words, width = self.codebook.sums.shape
        value_width = self.inner // self.num_heads
        return State(
            {
                "sums": torch.zeros(*heads, words, value_width + 1, device=device, dtype=accumulate_dtype(dtype)),
                "keys": torch.zeros(*heads, self.window, width, **place),
                "values": torch.zeros(*heads, self.window, value_width, **place),
                "codes": torch.zeros(*heads, self.window, device=device, dtype=torch.int64),
                "real": torch.zeros(batch_size, self.window, device=device, dtype=torch.bool),
                "structure": self.structure.past.begin(batch_size, device, dtype),
            }
        )

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Average, quantise, attend to codewords and window, gate."""
        a, q, k, v, structure = self._project(x, state["structure"], mask)
        codes = self.codebook.nearest(k)
        real = codes.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        k = self.codebook.quantize(k, codes)
        new = {"keys": k, "values": v, "codes": codes, "real": real}
        both = {name: torch.cat((state[name], piece), dim=1 if name == "real" else 2) for name, piece in new.items()}
        o, sums = vq_attention(
            q,
            both["keys"],
            both["values"],
            both["codes"],
            self.codebook.vectors,
            self.bias,
            key_mask=both["real"],
            state=state["sums"],
        )
        kept = {name: t[:, -self.window :] if name == "real" else t[:, :, -self.window :] for name, t in both.items()}

        return self._gate(x, a, o), State({"sums": cast("Tensor", sums), **kept, "structure": structure})

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """The whole sequence; in training mode the codebook learns from its keys."""
        a, q, k, v, _ = self._project(x, None, masks.query)
        codes = self.codebook.nearest(k)
        o = self._attend(q, k, v, codes, masks.query)
        self.emit("values", v)
        self.emit("mixed", o)
        self.emit("codes", codes)
        self.emit("commitment_loss", lambda: self.commitment * self.codebook.distance(k, codes, masks.query))
        y = self._gate(x, a, o)
        if self.learns and self.codebook.training:
            self.codebook.update(k, codes, masks.query)
        return y

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What the attention makes of identity values."""
        _, q, k, v, _ = self._project(x, None, masks.query)
        identity = torch.eye(x.shape[1], device=x.device, dtype=v.dtype).expand(*v.shape[:2], -1, -1)
        return self._attend(q, k, identity, self.codebook.nearest(k), masks.query)

    @torch.no_grad()
    def update_codebook(self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> None:
        """Move the codebook on by the keys of these tokens."""
        k = self._project(zero_masked(x, mask), None, mask)[2]
        self.codebook.update(k, self.codebook.nearest(k), mask)

    @torch.no_grad()
    def seed_codebook(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Draw the codewords among the keys of these tokens by k-means++, from ``generator``."""
        k = self._project(zero_masked(x, mask), None, mask)[2]
        self.codebook.seed(k, mask, generator)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, codes: Int[Tensor, "b h n"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b h n e"]:
        k, state = self.codebook.quantize(k, codes), None
        if self.causal:
            sums = accumulate_dtype(v.dtype)
            state = v.new_zeros(*v.shape[:2], self.codebook.counts.shape[1], v.shape[3] + 1, dtype=sums)
            real = codes.new_ones(len(q), q.shape[2], dtype=torch.bool) if mask is None else mask
            mask, codes = F.pad(real, (self.window, 0)), F.pad(codes, (self.window, 0))
            k, v = (F.pad(t, (0, 0, self.window, 0)) for t in (k, v))
        return vq_attention(q, k, v, codes, self.codebook.vectors, self.bias, key_mask=mask, state=state)[0]

    def _project(
        self, x: Float[Tensor, "b n c"], state: Tensor | None, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], Tensor, Tensor, Tensor, Float[Tensor, "b c ..."]]:
        """a, queries, keys, values, and the state of the state-space layer."""
        u = zero_masked(self.norm(x), mask)
        a, state = self.structure(u, state, mask)
        a = F.silu(a)
        z = F.silu(self.key_proj(a))
        q, k = (
            rearrange(z * kappa + mu, "b n (h d) -> b h n d", h=self.num_heads)
            for kappa, mu in zip(self.kappa, self.mu, strict=True)
        )
        v = rearrange(F.silu(self.value_proj(u)), "b n (h e) -> b h n e", h=self.num_heads)
        return a, q, k, v, state

    def _gate(self, x: Float[Tensor, "b n c"], a: Float[Tensor, "b n c"], o: Float[Tensor, "b h n e"]) -> Float[Tensor, "b n c"]:
        reset, candidate, update = self.gates(a).split([self.inner, self.dim, self.dim], dim=-1)
        read = F.silu(reset) * rearrange(o, "b h n e -> b n (h e)").to(x.dtype)
        h = F.silu(candidate + self.out_proj(read))
        return update.sigmoid() * (h - x) + x if self.highway else update.sigmoid() * h
