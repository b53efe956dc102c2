"""The tagger: an answer at every token, causally or not, with or without a second sequence to read."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.channel_mixers import create_channel_mixer
from attnlab.core.catalog import mixer_info
from attnlab.core.masks import check_mask, token_positions, zero_masked
from attnlab.core.tokens import Tokens
from attnlab.mixers.parts.short_convolution import ShortConvolution
from attnlab.models.cross_block import CrossBlock, require_cross
from attnlab.models.embedding import PositionEmbedding
from attnlab.models.norms import create_norm
from attnlab.models.registry import models
from attnlab.models.stack import (
    BlockOptions,
    ChannelOptions,
    MixerNames,
    MixerOptions,
    build_blocks,
    build_mixer,
    fix_lengths,
    layer_schedule,
    require_causal,
    require_sequence,
)

Layers = list[tuple[str, dict[str, Any]]]


class Reader(nn.Module):
    """Ids or vectors to tokens with positions.

    Args:
        what: name of the input in messages, and the beginning of its sizes' names.
        dim: width of the tokens.
        vocab_size: ids are 0 to vocab_size - 1; None where vectors are read.
        input_dim: numbers a vector; None where ids are read.
        position: "none", "learned" or "sinusoidal", counted over real tokens.
        max_length: tokens that learned positions reach.
        short_conv: taps of a causal depthwise convolution added to the embedded tokens; 0 for none.

    Raises:
        ValueError: unless one of the sizes is given.
    """

    def __init__(
        self,
        what: str,
        dim: int,
        vocab_size: int | None,
        input_dim: int | None,
        *,
        position: str,
        max_length: int | None,
        short_conv: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (vocab_size is None) == (input_dim is None):
            raise ValueError(f"{what}: expected a vocab_size or a width of vectors, got {vocab_size} and {input_dim}")
        self.what, self.vectors = what, input_dim is not None
        if input_dim is None:
            self.embedding: nn.Module = nn.Embedding(cast(int, vocab_size), dim, device=device, dtype=dtype)
        else:
            self.embedding = layer = nn.Linear(input_dim, dim, device=device, dtype=dtype)
            nn.init.normal_(layer.weight, std=input_dim**-0.5)
            nn.init.zeros_(layer.bias)
        self.position = PositionEmbedding(position, dim, max_length, std=1.0, device=device, dtype=dtype)
        self.short_conv = ShortConvolution(dim, short_conv, device=device, dtype=dtype) if short_conv else None

    def forward(
        self, inputs: Int[Tensor, "b n"] | Float[Tensor, "b n p"], mask: Bool[Tensor, "b n"] | None, mask_name: str
    ) -> Tokens:
        """The tokens of a sequence; what stands at masked places has no influence.

        Raises:
            TypeError: for ids where vectors are read, or the other way round.
            ValueError: for more tokens than learned positions reach.
        """
        if inputs.is_floating_point() != self.vectors:
            expected = "vectors (batch, n, width) in floating point" if self.vectors else "integer ids (batch, n)"
            raise TypeError(f"{self.what}: expected {expected}, got {inputs.dtype} of shape {tuple(inputs.shape)}")
        batch, n = inputs.shape[:2]
        check_mask(mask_name, mask, (batch, n))
        self.position.check_length(n)
        x = zero_masked(self.embedding(zero_masked(inputs, mask) if self.vectors else inputs), mask)
        if self.short_conv is not None:
            x = x + self.short_conv(x)[0]
        return Tokens(self.position(x, token_positions(batch, n, mask, device=inputs.device)), mask)


@models.register("tagger")
class Tagger(nn.Module):
    r"""Tokens or vectors to numbers at each of them: embedding, blocks, norm, head.

    Without a context the blocks mix by ``mixer``, causally where ``causal`` says so (a mixer that is always causal is so in any
    case). With a context, as CAB has it for its cross patterns (Zhang et al. 2022), a layer is softmax self-attention, causal or
    not, and then a block in which ``mixer`` reads the context, which softmax blocks of its own have encoded; ``blocks`` are
    these. Each output sees all of the context, and where causal no later token.

    Masked tokens are seen by no other token, and positions are counted over real ones.

    Args:
        num_outputs: numbers a token: class logits, or predictions.
        dim: width of the tokens.
        depth: layers.
        mixer: a registered mixer, or several names that are repeated in turn over the layers.
        num_heads: heads of those mixers that have some; None takes each mixer's default.
        causal: outputs do not depend on later tokens.
        mixer_options: the mixers' own options: one mapping for all, or one a name.
        vocab_size: token ids are 0 to vocab_size - 1; None where vectors are read.
        input_dim: numbers a vector; None where ids are read.
        context_vocab_size: likewise for the context; None for both is no context.
        context_dim: numbers a vector of the context.
        context_depth: softmax blocks over the context; by default as many as layers.
        channel_mixer: a registered channel mixer, or None for none.
        channel_options: its own options, such as ``hidden``: one mapping for all blocks, or one a layer (not with a context).
        norm: norm of the blocks and before the head.
        short_conv: taps of a causal depthwise convolution added to the embedded tokens, 0 for none; not over the context.
        position: "none", "learned" or "sinusoidal", in both sequences.
        max_length: tokens that learned positions reach; also the number that mixers built for one take.
        context_max_length: the same for the context; by default ``max_length``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: for a mixer that cannot be causal, or cannot read a context; some that can are named.
        UnknownNameError: for a name or option that does not exist.
        ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        num_outputs: int,
        dim: int,
        depth: int,
        mixer: MixerNames = "softmax",
        num_heads: int | None = None,
        *,
        causal: bool = False,
        mixer_options: MixerOptions | None = None,
        vocab_size: int | None = None,
        input_dim: int | None = None,
        context_vocab_size: int | None = None,
        context_dim: int | None = None,
        context_depth: int | None = None,
        channel_mixer: str | None = "mlp",
        channel_options: ChannelOptions | None = None,
        norm: str = "layer_norm",
        short_conv: int = 0,
        position: str = "sinusoidal",
        max_length: int | None = None,
        context_max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = None if device is None else torch.device(device)
        layers = layer_schedule(depth, mixer, mixer_options)
        self.dim, self.causal = dim, causal
        self.reads_context = context_vocab_size is not None or context_dim is not None
        for name, _ in layers:
            _check_mixer(name, causal, self.reads_context)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reader = Reader(
            "inputs", dim, vocab_size, input_dim, position=position, max_length=max_length, short_conv=short_conv, **place
        )
        options = BlockOptions(channel_mixer, channel_options or {}, norm)
        heads: dict[str, Any] = {"num_heads": num_heads, **place}
        softmax: Layers = [("softmax", {})] * depth
        if self.reads_context:
            length = max_length if context_max_length is None else context_max_length
            self.context_reader = Reader(
                "context", dim, context_vocab_size, context_dim, position=position, max_length=length, **place
            )
            blocks = depth if context_depth is None else context_depth
            encoder: Layers = [("softmax", {})] * blocks
            self.context_blocks = build_blocks(dim, encoder, options, causal=False, **heads) if blocks else nn.ModuleList()
            self.context_norm = create_norm(norm, dim, **place)
            plain = BlockOptions(None, norm=norm)
            self.self_blocks = build_blocks(dim, softmax, plain, causal=causal, **heads)
            self.blocks = _cross_blocks(dim, layers, options, causal, num_heads, device, dtype)
        else:
            self.blocks = build_blocks(dim, fix_lengths(layers, max_length), options, causal=causal, **heads)
        self.norm = create_norm(norm, dim, causal=causal, **place)
        self.head = nn.Linear(dim, num_outputs, **place)

    def forward(
        self,
        inputs: Int[Tensor, "b n"] | Float[Tensor, "b n p"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        context: Int[Tensor, "b m"] | Float[Tensor, "b m p2"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n k"]:
        """The outputs at every token; what they are at masked ones means nothing.

        Args:
            inputs: token ids (batch, n), or vectors (batch, n, input_dim).
            mask: (batch, n), True marks a real token.
            context: ids (batch, m), or vectors (batch, m, context_dim), for a model that reads one.
            context_mask: (batch, m), likewise.

        Raises:
            ValueError: for a context where none is read, or none where one is.
        """
        if (context is not None) != self.reads_context:
            expected, got = ("a second sequence", None) if self.reads_context else (None, "one")
            raise ValueError(f"context: expected {expected}, as the model was built, got {got}")
        tokens = self.reader(inputs, mask, "mask")
        if context is None:
            for block in self.blocks:
                tokens = block(tokens)
        else:
            read = self._encode(context, context_mask)
            for own, block in zip(self.self_blocks, self.blocks, strict=True):
                tokens = block(own(tokens), read)
        return self.head(self.norm(tokens.x, tokens.mask))

    def _encode(self, context: Tensor, mask: Tensor | None) -> Tokens:
        tokens = self.context_reader(context, mask, "context_mask")
        for block in self.context_blocks:
            tokens = block(tokens)
        return tokens.with_x(self.context_norm(tokens.x, tokens.mask))


def _check_mixer(name: str, causal: bool, reads_context: bool) -> None:
    if reads_context:
        require_cross(name, causal=causal)
    elif causal:
        require_causal(name)
    else:
        require_sequence(mixer_info(name))


def _cross_blocks(
    dim: int,
    layers: Layers,
    options: BlockOptions,
    causal: bool,
    num_heads: int | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> nn.ModuleList:
    blocks = []
    for index, ((name, own), of_channels) in enumerate(zip(layers, options.of_channels(len(layers)), strict=True)):
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        mixer = build_mixer(
            name, dim, own, causal=False, num_heads=num_heads, layer=index, num_layers=len(layers), device=device, dtype=dtype
        )
        channel = None
        if options.channel_mixer is not None:
            channel = create_channel_mixer(options.channel_mixer, dim, **{**place, **of_channels})
        blocks.append(CrossBlock(dim, mixer, channel, norm=options.norm, causal=causal, **place))
    return nn.ModuleList(blocks)
