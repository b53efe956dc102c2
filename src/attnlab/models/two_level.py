"""Transformer in Transformer: words inside each patch, and the patches, as two streams of one block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.channel_mixers import ChannelMixer, create_channel_mixer
from attnlab.core.grid import Grid
from attnlab.core.masks import zero_masked
from attnlab.core.tokens import Tokens
from attnlab.models.block import Block
from attnlab.models.norms import create_norm
from attnlab.models.registry import models
from attnlab.models.stack import build_mixer


@models.register("two_level", paper="tnt")
class TwoLevelBlock(nn.Module):
    r"""A block of two streams (Han et al. 2021, TNT, section 3.1): words $Y$ inside every patch, and patches $Z$.

    With m words of width c in each of P patches of width d, $\mathrm{Block}$ being norm, mixer, residual, norm, MLP, residual,

    $$Y \leftarrow \mathrm{Block}_{in}(Y), \qquad
      Z_p \leftarrow Z_p + \mathrm{LN}(W\, \mathrm{LN}([Y_{p1} \,\|\, \dots \,\|\, Y_{pm}])), \qquad
      Z \leftarrow \mathrm{Block}_{out}(Z)$$

    The inner block sees the words of one patch at a time. Prefix tokens (a class token) have no words. The words are the stream
    "words" of the tokens, (b, P, m, c). Time O(P m^2 c + P^2 d) with softmax attention.

    Args:
        dim: d.
        inner_dim: c.
        words: the sides of the words' grid in a patch, such as (4, 4); m is their product.
        num_heads: of the outer mixer; None takes its default.
        inner_heads: of the inner mixer.
        mixer: a registered mixer for the patches.
        mixer_options: its own options.
        inner_mixer: one for the words.
        inner_options: its own options.
        channel_options: options of the MLP in both blocks, such as ``bias``.
        squeeze: r, with which the output t of the outer MLP becomes
            $t + t \odot \tanh(W_2\,\mathrm{relu}(W_1\,\mathrm{LN}(\bar t)))$, inner width r d and $\bar t$ the mean of the
            tokens, prefix included; None for none.
        drop_path: probability with which training drops one of the four branches of an example; the injection stays.
        generator: what stochastic depth draws from.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for no words or an unfit ``squeeze``; in use, for words that do not fit the patches.
        UnknownNameError: for a mixer that does not exist.

    Differs from the paper: masked patches have words of zeros, and are in no mean. A module of blocks, no network: image
    embedding and heads are not here.
    """

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        words: Grid,
        num_heads: int | None = None,
        inner_heads: int | None = None,
        *,
        mixer: str = "softmax",
        mixer_options: Mapping[str, Any] | None = None,
        inner_mixer: str = "softmax",
        inner_options: Mapping[str, Any] | None = None,
        channel_options: Mapping[str, Any] | None = None,
        squeeze: float | None = None,
        drop_path: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.words, self.num_words = tuple(words), math.prod(words)
        if not self.words or min(self.words) < 1:
            raise ValueError(f"words: expected positive sides, got {self.words}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if squeeze is not None and int(squeeze * dim) < 1:
            raise ValueError(f"squeeze: expected a ratio that leaves a width of at least 1 of {dim}, got {squeeze}")

        def block(width: int, name: str, own: Mapping[str, Any] | None, heads: int | None, ratio: float | None) -> Block:
            mixer = build_mixer(name, width, own or {}, causal=False, num_heads=heads, **place)
            channel = create_channel_mixer("mlp", width, **{**place, **(channel_options or {})})
            if ratio is not None:
                channel = Squeezed(channel, int(ratio * width), **place)
            return Block(width, mixer, channel, drop_path=drop_path, generator=generator, **place)

        self.inner = block(inner_dim, inner_mixer, inner_options, inner_heads, None)
        self.outer = block(dim, mixer, mixer_options, num_heads, squeeze)
        width = self.num_words * inner_dim
        self.inject = nn.Linear(width, dim, bias=False, **place)
        self.words_norm = create_norm("layer_norm", width, causal=False, **place)
        self.inject_norm = create_norm("layer_norm", dim, causal=False, **place)

    def forward(self, tokens: Tokens) -> Tokens:
        """Both streams one block on.

        Raises:
            ValueError: without words (b, P, m, c) for the P tokens behind the prefix.
        """
        words, prefix = tokens.streams.get("words"), tokens.num_prefix
        b, n, _ = tokens.x.shape
        expected = (b, n - prefix, self.num_words, self.inner.dim)
        if words is None or tuple(words.shape) != expected:
            raise ValueError(f"tokens: expected a stream 'words' {expected}, got {None if words is None else tuple(words.shape)}")
        real = None if tokens.mask is None else tokens.mask[:, prefix:]
        each = None if real is None else real.reshape(-1, 1).expand(-1, self.num_words)
        words = self.inner(Tokens(words.flatten(0, 1), each, self.words)).x.view(expected)
        news = self.inject_norm(self.inject(self.words_norm(words.flatten(2), real)), real)
        x = tokens.x + F.pad(zero_masked(news, real), (0, 0, prefix, 0))
        return self.outer(replace(tokens, x=x, streams={**tokens.streams, "words": words}))


class Squeezed(ChannelMixer):
    """A channel mixer whose output is weighed, channel by channel, by what its mean over the tokens says.

    Args:
        inside: the channel mixer.
        width: between the two layers of the gate.
        device: of the parameters.
        dtype: of the parameters.
    """

    per_token: ClassVar[bool] = False

    def __init__(
        self, inside: ChannelMixer, width: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(inside.dim, inside.hidden)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inside, self.norm = inside, nn.LayerNorm(inside.dim, **place)
        self.down, self.up = nn.Linear(inside.dim, width, **place), nn.Linear(width, inside.dim, **place)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "b n c"]:
        """The channel mixer, then the gate; masked tokens are in no mean."""
        y = zero_masked(self.inside(x, mask=mask, grid=grid), mask)
        count = y.shape[1] if mask is None else mask.sum(1).clamp(min=1)[:, None]
        gate = self.up(torch.relu(self.down(self.norm(y.sum(1) / count))))
        return y + y * gate.tanh().unsqueeze(1)
