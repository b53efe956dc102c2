"""Kernelised attention with relative position: random features, and weights by offset through Fourier transforms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer
from attnlab.mixers.parts.features import elu_plus_one
from attnlab.mixers.parts.norms import l2_normalize
from attnlab.mixers.parts.random_features import orthogonal_directions, positive_features, trigonometric_features
from attnlab.ops.attention import Pairwise
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision
from attnlab.ops.linear_attention import linear_attention
from attnlab.ops.toeplitz import toeplitz_linear_attention

_MAPS = {"positive": positive_features, "trigonometric": trigonometric_features}


@mixers.register(
    "kernelized_relative",
    family="linear",
    paper="nprf-rpe-fft",
    supports=Supports(causal="optional", mixing_matrix=True, cost=1.0),
    example={"num_features": 8},
)
class KernelizedRelativeAttention(AttentionMixer):
    r"""Kernelised attention with relative position by Fourier transforms, NPRF with RPE (Luo et al. 2021).

    With $\hat q = q/\lVert q\rVert$, $\hat k$ likewise, features $\phi$ and a learned $b$ by offset,

    $$o_i = \frac{\sum_j a_{ij}\, v_j}{\sum_j a_{ij}}, \qquad a_{ij} = e^{b_{j-i}}\,\phi(\hat q_i)^\top \phi(\hat k_j), \qquad
      \phi(x) = \frac{e^{-\lVert x\rVert^2/2}}{\sqrt f}\left[e^{w_1^\top x}, \dots, e^{w_f^\top x}\right],\ w \sim N(0, I)$$

    which estimates softmax attention with logits $s\,\hat q_i^\top \hat k_j + b_{j-i}$ (queries and keys are multiplied by
    $s^{1/2}$). Over all j, or j <= i where causal. Numerator and denominator are one product with the Toeplitz matrix of
    $e^b$ for each feature and channel: time O(n log n f d), memory O(n (f + d)), for a few features at a time. The
    directions w are the buffer ``directions`` (f, d), shared by heads; `redraw` draws them anew.

    Args:
        dim: width of the tokens.
        num_heads: heads, each with its own b.
        causal: see `Mixer`.
        num_features: f.
        feature_map: "positive", "trigonometric" (2 f features; a denominator may vanish) or "elu" (elu(x) + 1, no directions).
        normalize: whether queries and keys are brought to length 1; without, positive features are unstable to train.
        scale: s; by default 1, or head_dim ** -0.5 without ``normalize``.
        head_dim: width of a head; by default dim / num_heads.
        qkv_bias: biases in the three input projections.
        out_bias: bias in the output projection.
        position: where b comes from, any position that is a bias by offset; "none" leaves it out, and the Fourier transforms.
        position_options: the position's own options; None is for "offset_table" 128 offsets on each side, and clipping beyond.
        generator: draws the directions.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an unknown feature map, fewer than one feature, a scale that is not positive; in use, for a position that
            is no bias by offset alone.

    Differs from the paper: far offsets share a b, where the paper has one for each of a fixed length; grids are not built. The
    largest b in use is subtracted from all, and a denominator below the resolution of the dtype raised to it: a query whose keys
    are all that much lighter than others' is not resolved. No official code was found: it is built from the card's equations.
    """

    directions: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        num_features: int = 64,
        feature_map: str = "positive",
        normalize: bool = True,
        scale: float | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = True,
        position: str = "offset_table",
        position_options: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if position == "offset_table" and position_options is None:
            position_options = {"rank": 1, "size": 129, "other_sizes": "clipped"}
        super().__init__(
            dim,
            num_heads,
            causal=causal,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            position=position,
            position_options=position_options,
            device=device,
            dtype=dtype,
        )
        if feature_map not in (*_MAPS, "elu"):
            raise ValueError(f"feature_map: expected one of {[*_MAPS, 'elu']}, got {feature_map!r}")
        if num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {num_features}")
        if scale is not None and scale <= 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        default = 1.0 if normalize else self.head_dim**-0.5
        self.feature_map, self.normalize, self.scale = feature_map, normalize, default if scale is None else scale
        drawn = None
        if feature_map in _MAPS:
            drawn = orthogonal_directions(num_features, self.head_dim, generator=generator, device=device, dtype=dtype)
        self.register_buffer("directions", drawn)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Replace the directions by new ones; nothing where the features have none."""
        if self.directions is not None:
            like = self.directions
            new = orthogonal_directions(*like.shape, generator=generator, device=like.device, dtype=like.dtype)
            like.copy_(new)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """The quotient of the two sums."""
        return self._quotient(q, k, v, masks, grid, "auto")

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The weights of all pairs, each by itself: no transform blurs those that are 0."""
        q, k, _ = self.project(x, context, self.place(x, masks.query))
        return self._quotient(q, k, self.identity(k), masks, grid, "reference")

    @full_precision
    def _quotient(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, grid: Grid | None, backend: str
    ) -> Float[Tensor, "b h n e"]:
        weights = self._weights(q, k.shape[2], grid)
        wide = accumulate_dtype(q.dtype)
        phi_q, phi_k = self._features(q.to(wide)), self._features(k.to(wide))
        if masks.key is not None:
            phi_k = phi_k.masked_fill(~masks.key[:, None, :, None], 0.0)
        with_ones = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1).to(wide)
        if weights is None:
            sums = linear_attention(phi_q, phi_k, with_ones, causal=self.causal, backend=backend)[0]
        else:
            sums = toeplitz_linear_attention(weights.to(wide), phi_q, phi_k, with_ones, causal=self.causal, backend=backend)
        if masks.key is not None:
            # Rounding errors of the transforms reach queries that have no key.
            seen = masks.key.cumsum(dim=1) if self.causal else masks.key.sum(dim=1, keepdim=True)
            sums = sums.masked_fill((seen == 0)[:, None, :, None], 0.0)
        return (sums[..., :-1] / sums[..., -1:].clamp(min=torch.finfo(wide).eps)).to(v.dtype)

    def _features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n f"]:
        x = (l2_normalize(x) if self.normalize else x) * self.scale**0.5
        if self.directions is None:
            return elu_plus_one(x)
        return _MAPS[self.feature_map](x, self.directions.to(x.dtype))

    def _weights(self, q: Tensor, num_keys: int, grid: Grid | None) -> Float[Tensor, "#h r"] | None:
        """$e^b$ by offset, at most 1; None without a bias."""
        term = Pairwise.of(self.position.bias(q, num_keys, causal=self.causal, grid=grid))
        factor = self.position.factor(q, num_keys, causal=self.causal, grid=grid)
        if term.dense is not None or term.keys is not None or factor is not None:
            raise ValueError(f"position: expected a bias by offset alone, got {self.position_name!r}")
        if term.offsets is None:
            return None
        used = term.offsets[:, :num_keys] if self.causal else term.offsets
        return (term.offsets - used.detach().amax(dim=-1, keepdim=True)).exp()
