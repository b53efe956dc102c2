"""Perturbed grouped queries: noise with the moments of each head's output is taken from it, as a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import DENSE, AttentionMixer, AttentionOptions
from attnlab.mixers.heads.key_driven_gqa import halved
from attnlab.ops.backends import accumulate_dtype


@mixers.register(
    "perturbed_gqa",
    family="heads",
    paper="key-driven-gqa",
    supports=replace(DENSE, causal="no", streaming=False, state="none"),
)
class PerturbedGQA(AttentionMixer):
    r"""Grouped-query attention minus noise that looks like its output, in training (Khan et al. 2024, PGQA: a control).

    Let $o_h \in \mathbb{R}^{n d}$ be what head h makes of an example, all tokens in a row, and $u_h$ a row of uniform noise of
    [0, 1), with 0 at entry j for the j-th query head of its group. With unbiased standard deviations, all over real tokens,

    $$o_h \leftarrow o_h - \Big(\operatorname{mean}(o_h) + \operatorname{std}(o_h)\,
      \frac{u_h - \operatorname{mean}(u_h)}{\operatorname{std}(u_h)}\Big)$$

    before the output projection. The noise is one for all examples of a batch. In evaluation nothing is subtracted, unless
    `hold` gives the noise. Time and memory are those of softmax attention. The moments read all tokens, so there is no causal
    form. ``noise`` is what was last drawn (h, n, d); ``record`` collects it.

    Args:
        dim: width of the tokens.
        num_heads: H.
        generator: source of the noise. Gradient checkpointing repeats draws of the global generator alone: with one of your
            own, `hold` the noise.
        **options: those of `AttentionMixer`; ``num_kv_heads`` is half of ``num_heads`` by default.

    Raises:
        UnsupportedError: with ``causal=True``.

    Differs from the paper: the text describes the noise on attention maps, the authors' code and this have it on the heads'
    outputs. The code draws in evaluation too.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        generator: torch.Generator | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **halved(num_heads, options))
        self.generator = generator
        self.noise: Tensor | None = None
        self.held = False

    def hold(self, noise: Float[Tensor, "h n d"] | None) -> None:
        """Subtract noise of this shape, in training and evaluation, until None lets it be drawn again."""
        self.noise, self.held = noise, noise is not None

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the allowed keys."""
        return self.dense(q, k, v, masks, grid)

    def weigh_heads(
        self, heads: Float[Tensor, "b h n e"], x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b h n e"]:
        """The head outputs minus the noise."""
        if self.training and not self.held:
            self.noise = self._draw(heads)
        if self.noise is None or not (self.training or self.held):
            return heads
        if self.noise.shape != heads.shape[1:]:
            raise ValueError(f"noise: expected shape {tuple(heads.shape[1:])} (h, n, d), got {tuple(self.noise.shape)}")
        self.emit("noise", self.noise)
        wide = accumulate_dtype(heads.dtype)
        real = heads.new_ones(heads.shape[0], heads.shape[2], dtype=torch.bool) if mask is None else mask
        mean, deviation = _moments(heads.to(wide), real)
        noise = self.noise.to(wide).expand(len(heads), -1, -1, -1)
        noise_mean, noise_deviation = _moments(noise, real)
        noise = (noise - noise_mean) / noise_deviation.masked_fill(noise_deviation == 0, 1.0)
        return heads - (noise * deviation + mean).to(heads.dtype)

    def mix_packed(self, x: Float[Tensor, "t c"], lengths: Sequence[int]) -> Float[Tensor, "t c"]:
        """One sequence after the other, each with moments of its own."""
        return Mixer.mix_packed(self, x, lengths)

    def _draw(self, heads: Float[Tensor, "b h n e"]) -> Float[Tensor, "h n e"]:
        """Uniform noise with the zero of each row."""
        device = heads.device if self.generator is None else self.generator.device
        shape = (heads.shape[1], heads.shape[2] * heads.shape[3])
        rows = torch.rand(shape, generator=self.generator, device=device).to(heads)
        head = torch.arange(shape[0], device=heads.device) % (self.num_heads // self.num_kv_heads)
        rows = rows.masked_fill(torch.arange(shape[1], device=heads.device) == head[:, None], 0.0)
        return rows.reshape(heads.shape[1:])


def _moments(x: Float[Tensor, "b h n e"], real: Bool[Tensor, "b n"]) -> tuple[Float[Tensor, "b h 1 1"], Float[Tensor, "b h 1 1"]]:
    """Mean and unbiased standard deviation over real tokens and channels; 0 where there are too few."""
    there, count = real[:, None, :, None], (real.sum(dim=1) * x.shape[-1])[:, None, None, None]
    mean = x.masked_fill(~there, 0.0).sum(dim=(2, 3), keepdim=True) / count.clamp(min=1)
    variance = (x - mean).masked_fill(~there, 0.0).square().sum(dim=(2, 3), keepdim=True) / (count - 1).clamp(min=1)
    flat = variance == 0  # where the root has no derivative
    return mean, variance.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)
