"""Attention whose heads can do nothing: a clipped softmax, and gates on the head outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import DENSE, AttentionOptions, CachedAttention
from attnlab.mixers.parts.head_gates import GATES, SCOPES, HeadGate
from attnlab.ops.attention import ClippedSoftmax, Normalizer


@mixers.register("quantizable", family="dense", paper="quantizable-transformers", supports=DENSE, example={"gate": "linear"})
class QuantizableAttention(CachedAttention):
    r"""Softmax attention that reaches exact zeros, so that no head needs outliers to output nothing (Bondarenko et al. 2023).

    $$o_i = g_i \sum_j \mathrm{clip}\big((\zeta - \gamma)\,\mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j + b_{ij}) + \gamma,\;
      0,\; 1\big)\, v_j , \qquad g_i = \sigma(G_h(x_i))$$

    with a clipped softmax, whose rows need not sum to one and whose clipped entries have no gradient, and a gate a head on the
    output before the heads are joined (`HeadGate`). Each remedy works alone; with neither this is "softmax". Time O(n m d),
    memory O(n + m). ``record`` collects "gates" (b or 1, n or 1, h).

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        gamma: $\gamma \le 0$; None is -alpha / max_length, or -0.03 without alpha. 0 does not clip below.
        zeta: $\zeta \ge 1$; 1 suffices in practice.
        alpha: with ``max_length`` in place of gamma, the same for models of any length; the authors' 2 to 4.
        max_length: T, the longest sequence of training.
        gate: "none", or how $G_h$ predicts: "linear", "mlp", "mlp2" from the head's slice of x, "all_features" from all of x.
        gate_scope: "token"; "head", logits averaged over the real tokens; or "unconditional", a learned number a head.
        gate_init: $\pi$, the gates at first.
        pretrained: gates begin at $\pi$ exactly but for small weights and are multiplied by $1/\pi$, so that a trained network
            begins as what it was.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for constants outside of their range, alpha with gamma, one of alpha and max_length alone, an unknown gate or
            scope, or ``pretrained`` without a gate.
        UnsupportedError: for ``causal=True`` with gates a head, whose average reads later tokens.

    Differs from the paper: gates read slices of the input x although the projections mix its channels, as in the authors' code;
    the average of gates a head leaves padding out. ``gate_init`` holds for unconditional gates too, which the authors begin at
    0.5. "gates" are recorded before the factor $1/\pi$.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        gamma: float | int | None = None,
        zeta: float | int = 1.0,
        alpha: float | int | None = None,
        max_length: int | None = None,
        gate: str = "none",
        gate_scope: str = "token",
        gate_init: float = 0.25,
        pretrained: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        if gate not in GATES:
            raise ValueError(f"gate: expected one of {GATES}, got {gate!r}")
        if gate_scope not in SCOPES:
            raise ValueError(f"gate_scope: expected one of {SCOPES}, got {gate_scope!r}")
        if pretrained and gate == "none":
            raise ValueError("pretrained: expected a gate to rescale, got gate='none'")
        self.reads_all = gate != "none" and gate_scope == "head"
        super().__init__(dim, num_heads, **options)
        self.normalizer = _normalizer(gamma, zeta, alpha, max_length)
        self.gate: HeadGate | None = None
        if gate != "none":
            place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
            self.gate = HeadGate(dim, num_heads, kind=gate, scope=gate_scope, init=gate_init, pretrained=pretrained, **place)
        self.factor = 1.0 / gate_init if pretrained else 1.0

    @property
    def supports(self) -> Supports:
        """Those of dense attention; a gate that averages over tokens is neither causal nor a matter of chosen pairs."""
        if not self.reads_all:
            return self.info.supports
        return Supports(cross=True, grid=DENSE.grid, mixing_matrix=True, permutation_equivariant=True, cost=DENSE.cost)

    def mix_packed(self, x: Float[Tensor, "t c"], lengths: Sequence[int]) -> Float[Tensor, "t c"]:
        """All projections at once, or a sequence at a time where gates average over one."""
        return Mixer.mix_packed(self, x, lengths) if self.reads_all else super().mix_packed(x, lengths)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Clipped softmax over the allowed keys."""
        return self.dense(q, k, v, masks, grid, normalizer=self.normalizer)

    def weigh_heads(
        self, heads: Float[Tensor, "b h n e"], x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b h n e"]:
        """Head outputs times their gates."""
        if self.gate is None:
            return heads
        gates = self.gate(x, mask)
        self.emit("gates", gates)
        return heads * (gates * self.factor).transpose(1, 2).unsqueeze(-1).to(heads.dtype)


def _normalizer(
    gamma: float | int | None, zeta: float | int, alpha: float | int | None, max_length: int | None
) -> str | Normalizer:
    """The clipped softmax with these constants, or "softmax" where they clip nothing."""
    if alpha is not None:
        if gamma is not None:
            raise ValueError(f"alpha: expected None with gamma={gamma}, got {alpha}")
        if max_length is None or max_length < 1:
            raise ValueError(f"max_length: expected a positive integer with alpha={alpha}, got {max_length}")
        gamma = -alpha / max_length
    elif max_length is not None:
        raise ValueError(f"max_length: expected None without alpha, got {max_length}")
    gamma = -0.03 if gamma is None else gamma
    clipped = ClippedSoftmax(gamma, zeta)
    return "softmax" if gamma == 0 and zeta == 1 else clipped
