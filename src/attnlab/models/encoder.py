"""The encoder with a classification head, over token sequences or patch grids, around any mixer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixer_info
from attnlab.core.errors import UnknownNameError, UnsupportedError, nearest
from attnlab.core.grid import Grid, resolve_grid
from attnlab.core.masks import check_mask, token_positions, zero_masked
from attnlab.core.tokens import Tokens, pack, unpack
from attnlab.models.embedding import PositionEmbedding
from attnlab.models.norms import create_norm
from attnlab.models.registry import models
from attnlab.models.stack import (
    BlockOptions,
    ChannelOptions,
    MixerNames,
    MixerOptions,
    build_blocks,
    fix_lengths,
    named_schedule,
    require_sequence,
)

POOLS = ("mean", "first", "last")
"""How tokens become one vector."""
INPUTS = ("tokens", "patches")
"""What the model reads."""


def pool_tokens(x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, pool: str) -> Float[Tensor, "b c"]:
    """One vector an example: the mean of its real tokens, or the first or last of them; 0 where there is none."""
    if pool == "mean":
        if mask is None:
            return x.mean(1)
        return zero_masked(x, mask).sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(x.dtype)
    if mask is None:
        return x[:, 0 if pool == "first" else -1]
    order = mask.int() if pool == "first" else mask.int().flip(1)
    index = order.argmax(1)
    index = index if pool == "first" else x.shape[1] - 1 - index
    return zero_masked(x, mask)[torch.arange(x.shape[0], device=x.device), index]


@models.register("encoder")
class EncoderClassifier(nn.Module):
    """Tokens or patches to class logits: embedding, blocks, norm, pooling, head.

    A mixer that is always causal runs causally over the raster sequence; the others see all tokens, on the grid where they
    support its rank.

    Args:
        num_classes: logits.
        dim: width of the tokens.
        depth: blocks.
        mixer: a registered mixer, or several names that are repeated in turn over the layers.
        num_heads: heads of those mixers that have some; None takes each mixer's default.
        mixer_options: the mixers' own options: one mapping for all, or one a name; with ``schedule``, by the mixer's name.
        schedule: a registered layer schedule that names the mixers, in place of ``mixer``; see `list_schedules`.
        schedule_options: its own options, such as ``num_full``.
        input: "tokens" (ids, needs ``vocab_size``) or "patches" (vectors, needs ``patch_dim``).
        vocab_size: token ids are 0 to vocab_size - 1.
        patch_dim: numbers a patch.
        grid: sides of the grid, row-major; None is a sequence.
        pool: "mean" over real tokens, the "first" or the "last" real token.
        channel_mixer: a registered channel mixer, or None for none.
        channel_options: its own options, such as ``hidden``: one mapping for all blocks, or one a block.
        norm: norm of the blocks and before pooling.
        placement: where the norms stand: "pre", "post" or "sandwich".
        parallel: mixer and channel mixer side by side.
        layer_scale: initial LayerScale, or None.
        drop_path: stochastic depth of the last block, rising linearly over the layers.
        position: "none", "learned" or "sinusoidal"; counted over real tokens, on a grid over its cells.
        max_length: tokens that learned positions reach; by default the cells of ``grid``.
        packing: run the blocks on the real tokens alone where a mask is given; every example must have one.
        generator: what stochastic depth draws from.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnknownNameError: for a name or option that does not exist.
        UnsupportedError: for a mixer that does not take the input's shape, or blocks that cannot be packed.
        ValueError: if the input's size is missing, or a causal mixer pools its first token.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        depth: int,
        mixer: MixerNames = "softmax",
        num_heads: int | None = None,
        *,
        mixer_options: MixerOptions | None = None,
        schedule: str | None = None,
        schedule_options: Mapping[str, Any] | None = None,
        input: str = "tokens",
        vocab_size: int | None = None,
        patch_dim: int | None = None,
        grid: Grid | None = None,
        pool: str = "mean",
        channel_mixer: str | None = "mlp",
        channel_options: ChannelOptions | None = None,
        norm: str = "layer_norm",
        placement: str = "pre",
        parallel: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        position: str = "learned",
        max_length: int | None = None,
        packing: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = None if device is None else torch.device(device)
        for name, value, allowed in (("pool", pool, POOLS), ("input", input, INPUTS)):
            if value not in allowed:
                raise UnknownNameError(f"{name}: expected one of {allowed}, got {value!r}{nearest(value, allowed)}")
        layers = named_schedule(depth, schedule, schedule_options, mixer, mixer_options)
        for name, _ in layers:
            self._check_mixer(name, grid, pool)
        self.dim, self.grid, self.pool = dim, grid, pool
        self.embedding = _input_layer(input, dim, vocab_size, patch_dim, device, dtype)
        if max_length is None and grid is not None:
            max_length = int(torch.Size(grid).numel())
        self.position = PositionEmbedding(position, dim, max_length, std=1.0, device=device, dtype=dtype)
        layers = fix_lengths(layers, max_length)
        options = BlockOptions(channel_mixer, channel_options or {}, norm, placement, parallel, layer_scale, drop_path, generator)
        self.blocks = build_blocks(dim, layers, options, causal=False, num_heads=num_heads, device=device, dtype=dtype)
        self.packing = packing
        if packing and (grid is not None or not all(block.packs for block in self.blocks)):
            raise UnsupportedError("this encoder", "packing=True", "its blocks need a grid or a padded batch")
        self.norm = create_norm("none" if placement == "post" else norm, dim, device=device, dtype=dtype)
        self.head = nn.Linear(dim, num_classes, device=device, dtype=dtype)

    @staticmethod
    def _check_mixer(name: str, grid: Grid | None, pool: str) -> None:
        info = mixer_info(name)
        if grid is None or len(grid) not in info.supports.grid:
            require_sequence(info)
        if info.supports.causal == "always" and pool == "first":
            raise ValueError(f"pool: expected 'mean' or 'last' with the causal mixer {name!r}, got 'first', which sees one token")

    def forward(
        self,
        inputs: Int[Tensor, "b n"] | Float[Tensor, "b n p"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "b k"]:
        """Class logits.

        Args:
            inputs: token ids (batch, n), or patches (batch, n, patch_dim).
            mask: (batch, n), True marks a real token.
            grid: the grid of this input, by default the model's; without learned positions it may differ.
        """
        batch, n = inputs.shape[:2]
        check_mask("mask", mask, (batch, n))
        grid = self.grid if grid is None else grid
        if grid is not None:
            grid = resolve_grid(grid, n)
        self.position.check_length(n)
        if mask is not None and inputs.is_floating_point():
            inputs = zero_masked(inputs, mask)
        positions = token_positions(batch, n, mask if grid is None else None, device=inputs.device)
        tokens = Tokens(self.position(self.embedding(inputs), positions), mask, grid)
        packed = self.packing and mask is not None
        tokens = pack(tokens) if packed else tokens
        for block in self.blocks:
            tokens = block(tokens)
        tokens = unpack(tokens, mask) if packed and mask is not None else tokens
        return self.head(pool_tokens(self.norm(tokens.x, tokens.mask), tokens.mask, self.pool))


def _input_layer(
    input: str,
    dim: int,
    vocab_size: int | None,
    patch_dim: int | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """The embedding; patches of unit variance give tokens of unit variance, as ids do, to match the positions."""
    needed, other = ("vocab_size", "patch_dim") if input == "tokens" else ("patch_dim", "vocab_size")
    sizes = {"vocab_size": vocab_size, "patch_dim": patch_dim}
    size = sizes[needed]
    if size is None or sizes[other] is not None:
        raise ValueError(f"input={input!r}: expected {needed} and no {other}, got {needed}={size} and {other}={sizes[other]}")
    if input == "patches":
        layer = nn.Linear(size, dim, device=device, dtype=dtype)
        nn.init.normal_(layer.weight, std=size**-0.5)
        nn.init.zeros_(layer.bias)
        return layer
    return nn.Embedding(size, dim, device=device, dtype=dtype)
