"""Combiner: every token attends to every other one, to some directly and to the rest through spans."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.span_summaries import Sources
from attnlab.mixers.sparse.combiner_patterns import PATTERNS, Layout

CHOICES = {
    "pattern": tuple(PATTERNS),
    "activation": ("identity", "relu"),
    "reduction": ("max", "mean", "sum"),
    "row_summary": ("none", "wsum"),
}


@mixers.register(
    "combiner",
    family="sparse",
    paper="combiner",
    supports=Supports(causal="optional", mixing_matrix=True, cost=2.0),
    example={"segment": 3},
)
class CombinerAttention(AttentionMixer):
    r"""Attention factorised over single tokens and spans of tokens (Ren et al. 2021, arXiv 2107.05768).

    Query i uses the keys of a set $D_i$ directly and the spans r of a partition of the rest through one key each:

    $$p(j \mid i) = \begin{cases} p_i(j) & j \in D_i \\ \sum_{r \ni j} p_i(r)\, p_r(j) \end{cases} \qquad
      p_i = \mathrm{softmax}\big(s\, q_i^\top [k_{j \in D_i};\ \tilde k_r]\big), \quad
      p_r = \mathrm{softmax}_{j \in r}(s\, \tilde q_r^\top k_j)$$

    with $s = d^{-1/2}$ and $o_i = \sum_j p(j \mid i)\, v_j$. With the sequence in rows of L tokens, ``pattern`` is

    - "fixed": the own row directly, every (causal: earlier) row a span, $\tilde q_r, \tilde k_r$ pooled over it.
      O(n (L + n / L)).
    - "axial": the own row directly; of the (causal: earlier) rows, the token in the own column, whose value is what it sees of
      its whole row, $\tilde q_r = q_j, \tilde k_r = k_j$. O(n (L + n / L)).
    - "mixture": own row and own column directly; spans are the part above of every other column, and of every earlier row the
      parts left and right of the own column; $\tilde q_r, \tilde k_r$ are sums. Where not causal, whole row and column, and all
      columns above and below, all rows left and right. Tokens are in several spans. O(n (L + n / L)).
    - "logsparse": the token itself, and the dyadic blocks next to those that it is in, log n of them, pooled as in "fixed".
      O(n log n).

    Memory O(n d). Every allowed token has a weight above 0 (in "axial", but for a last row too short for the own column).

    Args:
        dim: width of the tokens.
        num_heads: heads.
        pattern: see above.
        segment: L; the last row may be shorter. About $\sqrt{n}$ is cheapest.
        activation: "identity" or "relu", before pooling.
        reduction: "max", "mean" or "sum".
        row_summary: the key of "axial": "none" for the token's own, "wsum" for the mean of its row's keys with the same weights.
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for an unknown choice, a segment below 1, or a position that is a bias.

    Differs from the paper: the pooling network ("deepset") and projected row summaries ("proj") are left out; "mixture" adds up
    where the paper takes maxima, as the authors' TensorFlow code does. Where not causal, "fixed" and "mixture" count the own row,
    token or column more than once, and "mixture" has empty spans at the borders with a key of zeros and the mean of the line as
    value, as that code has. A masked token is in no span, and a span of masked tokens is none.
    """

    pattern: str = "fixed"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        pattern: str = "fixed",
        segment: int = 64,
        activation: str = "identity",
        reduction: str = "max",
        row_summary: str = "none",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        given = {"pattern": pattern, "activation": activation, "reduction": reduction, "row_summary": row_summary}
        for name, value in given.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name}: expected one of {CHOICES[name]}, got {value!r}")
        if segment < 1:
            raise ValueError(f"segment: expected at least 1, got {segment}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; a span has no bias")
        self.pattern, self.segment = pattern, segment
        self.activation, self.reduction, self.row_summary = activation, reduction, row_summary

    @property
    def supports(self) -> Supports:
        """Dyadic blocks are linear up to a logarithm."""
        found = self.info.supports
        return found if self.pattern != "logsparse" else replace(found, cost=1.0)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """The sequence in rows, the last one filled up with masked tokens."""
        n = q.shape[2]
        length = 1 if self.pattern == "logsparse" else self.segment
        rows = -(-n // length)
        real = q.new_ones(q.shape[0], n, dtype=torch.bool) if masks.key is None else masks.key
        more = rows * length - n
        if masks.key is not None:  # sums and pools must not see what biases made of masked tokens
            q, k, v = (x.masked_fill(~real[:, None, :, None], 0.0) for x in (q, k, v))
        q, k, v = (F.pad(x, (0, 0, 0, more)) for x in (q * q.shape[-1] ** -0.5, k, v))
        layout = Layout(rows, length, self.causal, self.activation, self.reduction, self.row_summary)
        return PATTERNS[self.pattern](q, Sources(k, v, F.pad(real, (0, more))), layout)[:, :, :n]
