"""LoRA-Mixer: attention whose projections carry low-rank experts, chosen token by token."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.info import Supports
from attnlab.mixers.attention import DENSE, AttentionOptions, CachedAttention
from attnlab.mixers.parts.routed_lora import route_projections


@mixers.register(
    "lora_mixer",
    family="heads",
    paper="lora-mixer",
    supports=replace(DENSE, discontinuous=True),
    example={"num_experts": 4, "top_k": 2, "rank": 3},
)
class LoraMixer(CachedAttention):
    r"""Softmax attention with a mixture of LoRA experts in series with each of its four projections (Li et al. 2025).

    Every projection W of q, k, v and o becomes

    $$y = W x + \frac{a}{r} \sum_{e=1}^{E} g_e(x)\, A_e B_e x, \qquad p(x) = \mathrm{softmax}(W_r x) ,$$

    with one router $W_r$ for q, k and v and one for o. In training g = p (soft); in evaluation g keeps the ``top_k`` largest of
    p. Inside ``attnlab.mixers.parts.routed_lora.known_tasks(mixer, tasks)`` g is 1 for the expert of an example's task (hard).
    Beside softmax attention the cost is O(n E r c). The state holds all keys and values.

    ``record`` collects "router", p of q, k and v (b, n, E), and "routing_loss", a scalar to be added to the loss: of both
    routers, over real tokens, with the mean $\bar p$ and the share $\bar f$ of tokens that have e among their ``top_k``, summing
    to 1,

    $$L = \alpha \sum_e \bar p_e \bar f_e + s\,\lambda\, \mathrm{mean}_x H(p(x)) .$$

    `attnlab.mixers.parts.routed_lora` gives any other attention mixer such experts (`route_projections`), and keeps trained ones
    where they were (`preservation_loss`).

    Args:
        dim: width of the tokens.
        num_heads: heads.
        num_experts: E.
        rank: r, of every expert.
        lora_alpha: a; None for r.
        top_k: experts that a token uses in evaluation; None for all.
        renormalize: divide their weights by their sum.
        balance_weight: $\alpha$.
        entropy_weight: $\lambda$.
        entropy_sign: s: 1 makes routing peaked, -1 is the sign that the paper prints, which makes it even.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for counts that do not fit, or an ``entropy_sign`` other than 1 and -1.

    Differs from the paper: what it leaves open is our reading: which projections share a router, that kept weights are
    renormalised, and the sign of the entropy. With a context the loss counts the queries' tokens alone, and keys and values
    of another width have a router of their own. Where two experts weigh nearly the same, the choice in evaluation depends on
    rounding.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_experts: int = 4,
        rank: int = 8,
        lora_alpha: float | int | None = None,
        top_k: int | None = 3,
        renormalize: bool = True,
        balance_weight: float | int = 1.0,
        entropy_weight: float | int = 0.1,
        entropy_sign: int = 1,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if entropy_sign not in (1, -1):
            raise ValueError(f"entropy_sign: expected 1 or -1, got {entropy_sign}")
        self.chooses = top_k is not None and top_k < num_experts
        self.balance_weight, self.entropy_weight = balance_weight, entropy_sign * entropy_weight
        self.in_router, self.out_router = route_projections(
            self, num_experts=num_experts, rank=rank, alpha=lora_alpha, top_k=top_k, renormalize=renormalize
        )

    @property
    def supports(self) -> Supports:
        """With all experts in use there is no choice; in training there is none either."""
        return self.info.supports if getattr(self, "chooses", True) else DENSE

    def weigh_heads(
        self, heads: Float[Tensor, "b h n e"], x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b h n e"]:
        """The heads as they are; what goes into the output projection is known here, and so the routers' loss."""
        self.emit("router", lambda: self.in_router.scores(x))
        self.emit("routing_loss", lambda: self._loss(x, heads.transpose(1, 2).flatten(2), mask))
        return heads

    def _loss(
        self, x: Float[Tensor, "b n c"], joined: Float[Tensor, "b n i"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, ""]:
        weights = {"balance": self.balance_weight, "entropy": self.entropy_weight}
        first = self.in_router.specialisation_loss(x, mask, **weights)
        return first + self.out_router.specialisation_loss(joined, mask, **weights)
