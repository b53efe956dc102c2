"""Pair-wise cross-attention: in training another image of the batch distracts, in evaluation plain self-attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import DENSE, AttentionMixer, AttentionOptions


def draw_partners(
    batch_size: int, *, generator: torch.Generator | None = None, device: torch.device | None = None
) -> Int[Tensor, " b"]:
    """For each example another one of the batch, each taken once, in a random cycle; alone an example is its own partner."""
    source = device if generator is None else generator.device
    order = torch.randperm(batch_size, generator=generator, device=source)
    return torch.empty_like(order).scatter(0, order, order.roll(1)).to(device)


@mixers.register(
    "pair_wise",
    family="cross",
    paper="dcal",
    supports=replace(DENSE, causal="no", cross=False, pair_mask=False, streaming=False, state="none", batch_coupled=True),
)
class PairWiseAttention(AttentionMixer):
    r"""Self-attention whose keys and values are joined, in training, by those of a partner in the batch (Zhu et al. 2022, PWCA).

    With the partner $\pi(b)$ of example b,

    $$y_b = \mathrm{softmax}\big(d^{-1/2}\, Q_b\, [K_b; K_{\pi(b)}]^\top\big)\, [V_b; V_{\pi(b)}]$$

    in training, which makes attention more even; the loss is to use the label of b alone. In evaluation
    $y_b = \mathrm{softmax}(d^{-1/2} Q_b K_b^\top) V_b$, and an example depends on no other. The partner's masked tokens take no
    part. Time O(2 n^2 d) in training, O(n^2 d) in evaluation, memory O(n d). ``record`` collects "partners" (b,).

    The paper runs every image through all blocks twice, with shared weights: once alone, once with the same partner in each
    block. `pair_wise_branch` does either with one model. Without it each call in training draws partners of its own.
    ``partners`` is the last draw; `hold` sets it. In training the mixing matrix is (b, h, n, 2 n), the partner's tokens last.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        generator: source of the draws. Gradient checkpointing repeats draws of the global generator alone: with one of your
            own, `hold` the partners.
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for a position that is a bias; for partners that do not fit the batch.
        UnsupportedError: with ``causal=True``.

    Differs from the paper: nothing in the formula.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        generator: torch.Generator | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if self.position_name not in ("none", "rotary"):
            raise ValueError(
                f"position: expected 'none' or 'rotary', got {self.position_name!r}; a partner's tokens have no place in a bias"
            )
        self.generator = generator
        self.alone = False
        self.partners: Tensor | None = None
        self.held = False

    def hold(self, partners: Int[Tensor, " b"] | None) -> None:
        """Pair with these examples, in training and evaluation, until None lets partners be drawn again, in training."""
        self.partners, self.held = partners, partners is not None

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Find the partners, join their keys, attend."""
        paired = self.held or (self.training and not self.alone)
        if paired and not self.held:
            self.partners = draw_partners(len(x), generator=self.generator, device=x.device)
        q, k, v, masks = self._join_partners(x, masks, paired=paired)
        heads = self.attend(q, k, v, masks, grid)
        self.show(q, k, v, heads, masks, grid)
        return self.join(heads, x, masks.query)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The softmax map; paired with the last partners, if there are such."""
        paired = self.held or (self.training and not self.alone and self.partners is not None)
        q, k, _, masks = self._join_partners(x, masks, paired=paired)
        return self.attend(q, k, self.identity(k), masks, grid)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the allowed keys; a mask of pairs is none, since it says nothing of the partner."""
        return self.dense(q, k, v, masks._replace(pair=None), grid)

    def _join_partners(
        self, x: Float[Tensor, "b n c"], masks: Masks, *, paired: bool
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hk m d"], Float[Tensor, "b hk m d"], Masks]:
        """Queries, keys, values and masks, with the partner's keys behind one's own where there is one."""
        q, k, v = self.project(x, None, self.place(x, masks.query))
        if not paired or self.partners is None:
            return q, k, v, masks
        partners = self.partners
        if tuple(partners.shape) != (len(x),):
            raise ValueError(f"partners: expected shape {(len(x),)} as the batch, got {tuple(partners.shape)}")
        self.emit("partners", partners)
        k, v = (torch.cat((part, part[partners]), dim=2) for part in (k, v))
        key = None if masks.key is None else torch.cat((masks.key, masks.key[partners]), dim=1)
        return q, k, v, masks._replace(key=key)


@contextmanager
def pair_wise_branch(model: nn.Module, partners: Int[Tensor, " b"] | None) -> Iterator[None]:
    """Inside the block every `PairWiseAttention` of ``model`` uses these partners, or none: the two branches of training.

    Raises:
        ValueError: for a model without any.
    """
    found = [module for module in model.modules() if isinstance(module, PairWiseAttention)]
    if not found:
        raise ValueError("model: expected a mixer 'pair_wise' in it, got none")
    before = [(one.partners, one.held, one.alone) for one in found]
    for one in found:
        one.hold(partners)
        one.alone = partners is None
    try:
        yield
    finally:
        for one, (said, held, alone) in zip(found, before, strict=True):
            one.partners, one.held, one.alone = said, held, alone
