"""Graph isomorphic attention: each head is a GIN layer on its own attention map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.info import Supports
from attnlab.core.state import State
from attnlab.mixers.attention import CachedAttention
from attnlab.mixers.graph.adjacency_attention import AdjacencyAttention, AdjacencyOptions
from attnlab.mixers.graph.head_mlp import HeadMLP


@mixers.register(
    "graph_isomorphic",
    family="graph",
    paper="graph-aware-attention",
    supports=Supports(
        causal="optional",
        pair_mask=True,
        streaming=True,
        grid=frozenset({1, 2, 3}),
        mixing_matrix=True,
        permutation_equivariant=True,
        state="grows",
        cost=2.0,
    ),
)
class GraphIsomorphicAttention(AdjacencyAttention, CachedAttention):
    r"""GIN attention (Buehler 2025, Graph-Aware Isomorphic Attention).

    With $X_h$ the slice of the tokens of head h, d channels, and the adjacency $\hat A_h$ of `AdjacencyAttention`,

    $$Z_h = \epsilon_h X_h + \hat A_h X_h, \qquad
      o_h = W_2^h\, \mathrm{SiLU}\big(\mathrm{RMSNorm}(W_1^h Z_h + b_1^h)\big) + b_2^h, \qquad y = W_o [o_1, \dots, o_H]$$

    There is no value projection: the nodes carry the tokens themselves. The mixing matrix is $\hat A_h$; the self term and what
    follows are outside of it. Time O(n^2 C), memory O(n^2) a head. The state holds the keys and slices of all tokens.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        expansion: inner width of a head's perceptron, relative to d.
        epsilon: $\epsilon_h$ at first, which is learned: the authors' code begins at 0, the paper writes $1 + \epsilon_h$, which
            is 1 here.
        head_norm: in the differential form, LayerNorm of each head's output, times $1 - \lambda$ at first.
        **options: those of `AdjacencyAttention`; heads have width dim / num_heads.

    Raises:
        ValueError: for another ``head_dim``, an expansion below 1, ``head_norm`` without ``differential``, and what
            `AdjacencyAttention` refuses.

    Differs from the paper: shaped entries are 0 at masked pairs, with raw scores too; "top_k" counts what a row may use, not the
    length. Combined shapings of the authors' code are left out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        expansion: int = 2,
        epsilon: float = 0.0,
        head_norm: bool = False,
        **options: Unpack[AdjacencyOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        width = dim // num_heads
        if self.head_dim != width:
            raise ValueError(f"head_dim: expected {width} (dim / num_heads): heads carry slices of tokens, got {self.head_dim}")
        if expansion < 1:
            raise ValueError(f"expansion: expected at least 1, got {expansion}")
        if head_norm and self.difference is None:
            raise ValueError("head_norm: expected False without differential=True, got True")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.v_proj = nn.Identity()  # type: ignore[assignment]
        self.epsilon = nn.Parameter(torch.full((num_heads, 1, 1), epsilon, **place))
        self.mlp = HeadMLP(num_heads, width, expansion * width, width, norm=True, **place)
        self.head_scale = nn.Parameter(torch.ones(num_heads, 1, width, **place)) if head_norm else None
        self.head_shift = nn.Parameter(torch.zeros(num_heads, 1, width, **place)) if head_norm else None

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No keys yet; they are wider than values in the differential form, and have a width of their own for "mlp"."""
        state = super().begin(batch_size, device, dtype)
        width = self.k_proj.out_features // self.num_heads * (1 if self.difference is None else 2)
        return State({**state, "k": torch.zeros(batch_size, self.num_heads, 0, width, device=device, dtype=dtype)})

    def weigh_heads(
        self, heads: Float[Tensor, "b h n e"], x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b h n e"]:
        """The self term, and each head's perceptron."""
        own = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        y = self.mlp(self.epsilon * own + heads)
        if self.head_scale is None or self.head_shift is None:
            return y
        y = F.layer_norm(y, y.shape[-1:]) * self.head_scale + self.head_shift
        return y * (1.0 - self.difference_start)
