"""Titans' neural memory as a layer: a network whose weights are written by gradient descent along the sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.mixers.memory.base import MEMORY, MemoryMixer, MemoryOptions, placed


@mixers.register("titans", family="memory", paper="titans", supports=MEMORY, example={"chunk": 4})
class Titans(MemoryMixer):
    r"""Neural long-term memory without attention (Behrouz et al. 2025, section 3, LMM).

    For one head with a network $M$ of L layers, keys and queries of length 1,

    $$S_t = \eta_t S_{t-1} - \theta_t \nabla_M \| M_{t'}(k_t) - v_t \|^2, \qquad M_t = (1 - \alpha_t) M_{t-1} + S_t, \qquad
    y_t = M_t(q_t),$$
    $$o_t = W_o (\mathrm{RMSNorm}(y_t) \odot \mathrm{SiLU}(W_g x_t)) .$$

    $t' = t - 1$ for ``chunk=1``, otherwise the last token of the chunk before, chunks counted from the first token: another
    function, which needs no weights of single tokens. Every token reads a memory that has seen itself. `NeuralMemory` says what
    q, k, v and the gates are. Time O(n (w + c d)) for w weights of all heads and chunks of c, memory O(n d + w n / c) with
    gradients and O(n d + w) without. State: three times w, the place in the chunk and the windows of the convolutions.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        **options: those of `MemoryMixer`.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an option out of its range.

    Differs from the paper, which leaves open the heads, the widths of memory, convolutions and gates, the gates' ranges, the
    memory's activation, the output norm and gate: all of these are choices here. The gates are those of single tokens, as in
    its experiments. The gradient has the factor 2 of the squared error, which its equation 17 drops. A masked token is as if it
    were not there, in convolutions and chunks too.
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Unpack[MemoryOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        place = placed(options)
        self.out_norm = nn.RMSNorm(dim // self.store.num_heads, **place)
        self.gate_proj = nn.Linear(dim, dim, bias=False, **place)
        self.out_proj = nn.Linear(dim, dim, bias=False, **place)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The learned first memory."""
        return self.store.begin(batch_size, device, dtype)

    def advance(
        self,
        x: Float[Tensor, "b n c"],
        state: State,
        *,
        mask: Bool[Tensor, "b n"] | None,
        place: int | None = None,
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Write and read, normalise, gate, project; ``place`` as for `NeuralMemory`."""
        heads, state = self.store(x, state, mask, place)
        self.emit("read", heads)
        heads = heads.to(self.out_norm.weight.dtype)  # which autocast lowers
        y = self.out_norm(heads.transpose(1, 2)).flatten(2)
        return self.out_proj(y * F.silu(self.gate_proj(x))), state

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """The whole sequence begins at place 0."""
        return self.advance(x, self.begin(x.shape[0], x.device, x.dtype), mask=masks.query, place=0)[0]
