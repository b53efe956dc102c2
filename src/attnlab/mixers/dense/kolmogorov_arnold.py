"""Attention whose rows of scores pass a learned operator of one-variable functions in place of softmax."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, allowed_pairs
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.row_operator import KolmogorovArnoldRows
from attnlab.mixers.parts.univariate import project_to_simplex
from attnlab.ops.attention import Pairwise, attention_map


@mixers.register(
    "kolmogorov_arnold",
    family="dense",
    paper="karat",
    supports=Supports(pair_mask=True, grid=frozenset({1, 2, 3}), mixing_matrix=True, tokens_option="num_tokens", cost=2.0),
    example={"num_tokens": 12, "rank": 3},
)
class KolmogorovArnoldAttention(AttentionMixer):
    r"""Kolmogorov-Arnold attention (Maity et al. 2025, KArAt): each head learns what rows of scores become.

    $$A = d^{-1/2}\, Q K^\top + B, \qquad O = \sigma(A)\, V, \qquad
      \sigma(a) = W u, \quad u_p = \sum_{q=1}^{N} \varphi_{pq}(a_q), \; p = 1..r$$

    on every row a of A, with learned functions of one variable $\varphi_{pq}$ and $W \in \mathbb{R}^{N \times r}$
    (`KolmogorovArnoldRows`; ``rank=None`` is $\sigma(a) = u$ with p = 1..N). N, the number of tokens, is fixed. Rows are neither
    positive nor normalised. Time O(N^2 d + N^2 r G), memory O(N^2) a head: the scores are formed. With the basis "fourier" an
    operator has 2 G r N + r N parameters a head.

    Args:
        dim: width of the tokens.
        num_heads: heads, of keys and values too.
        num_tokens: N, a class token included.
        basis: "fourier", "rational", "mexican_hat", "morlet", "derivative_of_gaussian", "meyer" or "shannon".
        rank: r of the modular form; None for the full one.
        num_frequencies: G of "fourier".
        residual: a term b(x) in every function: "zero", "identity", "silu" or "gelu".
        edge_weights: learned factors of b and of the basis function on each edge.
        simplex: project every row to the nearest probability distribution, which costs accuracy.
        operator: rows of another layer, to be shared by both ("universal"); the options above that shape one are then its.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for sizes that do not fit, unknown names, grouped heads, or an operator of other heads or tokens.

    Differs from the paper: masks and pair masks are defined, as sums over the allowed q and zeros at the other p. How W begins is
    not published: here as in torch's linear layers. ``edge_weights`` is a guess at 2 r N parameters an operator that the
    published counts have and the equations have not. B-splines are not built.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_tokens: int,
        basis: str = "fourier",
        rank: int | None = 12,
        num_frequencies: int = 3,
        residual: str = "zero",
        edge_weights: bool = False,
        simplex: bool = False,
        operator: KolmogorovArnoldRows | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if self.num_kv_heads != num_heads:
            raise ValueError(f"num_kv_heads: expected {num_heads} (num_heads): heads learn apart, got {self.num_kv_heads}")
        self.num_tokens, self.simplex = num_tokens, simplex
        if operator is None:
            place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
            operator = KolmogorovArnoldRows(
                num_heads,
                num_tokens,
                basis=basis,
                rank=rank,
                num_frequencies=num_frequencies,
                residual=residual,
                edge_weights=edge_weights,
                **place,
            )
        self._take(operator)

    def share_with(self, other: KolmogorovArnoldAttention) -> None:
        """Use the operator of ``other``, so that both learn one; ValueError if its heads or tokens are not as many."""
        self._take(other.operator)

    def _take(self, operator: KolmogorovArnoldRows) -> None:
        if (operator.num_heads, operator.num_tokens) != (self.num_heads, self.num_tokens):
            raise ValueError(
                f"operator: expected {self.num_heads} heads and {self.num_tokens} tokens, "
                f"got {operator.num_heads} and {operator.num_tokens}"
            )
        self.operator = operator

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """The operator on every row of scores, times the values."""
        n, m, scale = q.shape[2], k.shape[2], self.head_dim**-0.5
        scores = attention_map(q, k, bias=self.position.bias(q, m, causal=False, grid=grid), normalizer="identity")
        allowed = allowed_pairs(n, m, causal=False, key_mask=masks.key, pair_mask=masks.pair, device=q.device)
        weights = self.operator(scores, allowed)
        if self.simplex:
            weights = project_to_simplex(weights, allowed)
        edit = Pairwise.of(self.position.factor(q, m, causal=False, grid=grid)).expanded(q, m, scale)
        return (weights if edit is None else weights * edit) @ v
