"""Linear attention with a positive feature map and a denominator."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.contract import StreamingMixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.features import elu_plus_one
from attnlab.ops.linear_attention import linear_attention

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": torch.relu,
    "softplus": F.softplus,
    "exp": torch.exp,
}


@mixers.register(
    "linear",
    family="linear",
    supports=Supports(
        causal="optional",
        cross=True,
        streaming=True,
        grid=frozenset({1, 2, 3}),
        mixing_matrix=True,
        permutation_equivariant=True,
        state="bounded",
        cost=1.0,
    ),
)
class LinearAttention(AttentionMixer, StreamingMixer):
    r"""Linear attention (Katharopoulos et al. 2020, equations 5 and 9), feature map $\phi(x) = \mathrm{elu}(x) + 1$ by default.

    $$o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}$$

    over all j, or over j <= i where causal. Time O(n d^2), memory O(n d): chunks, no n x n map. State: ``sum`` (b, h, d, d + 1),
    the outer products with a column of ones for the denominator.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        feature_map: "elu", "relu", "softplus" or "exp".
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all and ``position`` "none".

    Raises:
        ValueError: for an unknown feature map, grouped keys, or a position.

    Differs from the paper: queries whose denominator is 0 (no key, or "relu" with nothing in common) give exactly 0.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, feature_map: str = "elu", **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: expected one of {sorted(FEATURE_MAPS)}, got {feature_map!r}")
        if self.num_kv_heads != num_heads:
            raise ValueError(f"num_kv_heads: expected {num_heads} (every head keeps its own sum), got {self.num_kv_heads}")
        if self.position_name != "none":
            raise ValueError(
                f"position: expected 'none' (a rotation can make the denominator vanish), got {self.position_name!r}"
            )
        self.feature_map = feature_map

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """The quotient of the two sums."""
        return self._quotient(q, k, v, masks.key, None)[0]

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Empty sums."""
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim + 1)
        return State({"sum": torch.zeros(shape, device=device, dtype=dtype)})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Add the new tokens to the sums and read."""
        heads, total = self._quotient(*self.project(x), mask, state["sum"])
        return self.join(heads, x, mask), State({"sum": total})

    def _quotient(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, initial: Tensor | None
    ) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e1"]]:
        phi = FEATURE_MAPS[self.feature_map]
        q, k = phi(q), phi(k)
        if key_mask is not None:
            k = k.masked_fill(~key_mask[:, None, :, None], 0.0)
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        sums, total = linear_attention(q, k, v, initial_state=initial, causal=self.causal)
        weight = sums[..., -1:]
        empty = weight == 0
        return (sums[..., :-1] / weight.masked_fill(empty, 1.0)).masked_fill(empty, 0.0), total
