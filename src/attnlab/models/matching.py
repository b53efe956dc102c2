"""Two sequences through one encoder, and a head that says how they belong together."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixer_info
from attnlab.core.errors import UnknownNameError, nearest
from attnlab.core.masks import check_mask, token_positions
from attnlab.core.tokens import Tokens
from attnlab.models.embedding import PositionEmbedding
from attnlab.models.encoder import POOLS, pool_tokens
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

COMBINATIONS = {"concat": 2, "nli": 4}
"""How two vectors become one, and how many times as wide that is."""


@models.register("matching", paper="long-range-arena")
class MatchingEncoder(nn.Module):
    r"""Two token sequences to class logits, as Long Range Arena's document matching has it (Tay et al. 2020).

    Both go through the same embedding, blocks, norm and pooling, and nothing passes between them before their vectors
    $e_1, e_2$ meet:

    $$W_3\,\mathrm{ReLU}(W_2\,\mathrm{ReLU}(W_1\,e)), \qquad e = [e_1, e_2] \ \text{or}\ [e_1, e_2, e_1 e_2, e_1 - e_2],$$

    with inner widths h and h/2. Masked tokens take no part; the published code averages over padding too, and reads the first
    byte's state where it says CLS (``pool="first"`` here).

    Args:
        vocab_size: token ids are 0 to vocab_size - 1.
        dim: width of the tokens.
        depth: blocks.
        mixer: a registered mixer, or several names that are repeated in turn over the layers.
        num_heads: heads of those mixers that have some; None takes each mixer's default.
        num_classes: logits.
        mixer_options: the mixers' own options: one mapping for all, or one a name; with ``schedule``, by the mixer's name.
        schedule: a registered layer schedule that names the mixers, in place of ``mixer``; see `list_schedules`.
        schedule_options: its own options, such as ``num_full``.
        combine: "concat" for $[e_1, e_2]$, "nli" for $[e_1, e_2, e_1 e_2, e_1 - e_2]$.
        hidden: h, even; by default twice the width.
        pool: "mean" over real tokens, the "first" or the "last" real token.
        channel_mixer: a registered channel mixer, or None for none.
        channel_options: its own options, such as ``hidden``: one mapping for all blocks, or one a block.
        norm: norm of the blocks and before pooling.
        placement: where the norms stand: "pre", "post" or "sandwich".
        drop_path: stochastic depth of the last block, rising linearly over the layers.
        position: "none", "learned", "sinusoidal" or "interleaved_sinusoidal", counted over real tokens.
        max_length: tokens that learned positions, and mixers built for a number of tokens, reach.
        generator: what stochastic depth draws from.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnknownNameError: for a name or option that does not exist.
        UnsupportedError: for a mixer that takes no sequence.
        ValueError: for an odd inner width, or a causal mixer whose first token is read.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        mixer: MixerNames = "softmax",
        num_heads: int | None = None,
        *,
        num_classes: int = 2,
        mixer_options: MixerOptions | None = None,
        schedule: str | None = None,
        schedule_options: Mapping[str, Any] | None = None,
        combine: str = "concat",
        hidden: int | None = None,
        pool: str = "mean",
        channel_mixer: str | None = "mlp",
        channel_options: ChannelOptions | None = None,
        norm: str = "layer_norm",
        placement: str = "pre",
        drop_path: float = 0.0,
        position: str = "learned",
        max_length: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = None if device is None else torch.device(device)
        hidden = 2 * dim if hidden is None else hidden
        if hidden < 2 or hidden % 2:
            raise ValueError(f"hidden: expected an even positive integer, got {hidden}")
        for name, value, allowed in (("pool", pool, POOLS), ("combine", combine, tuple(COMBINATIONS))):
            if value not in allowed:
                raise UnknownNameError(f"{name}: expected one of {allowed}, got {value!r}{nearest(value, allowed)}")
        layers = named_schedule(depth, schedule, schedule_options, mixer, mixer_options)
        for name, _ in layers:
            info = mixer_info(name)
            require_sequence(info)
            if info.supports.causal == "always" and pool == "first":
                raise ValueError(f"pool: expected 'mean' or 'last' with the causal mixer {name!r}, got 'first'")
        self.dim, self.pool, self.combine = dim, pool, combine
        self.embedding = nn.Embedding(vocab_size, dim, device=device, dtype=dtype)
        self.position = PositionEmbedding(position, dim, max_length, std=1.0, device=device, dtype=dtype)
        options = BlockOptions(channel_mixer, channel_options or {}, norm, placement, drop_path=drop_path, generator=generator)
        self.blocks = build_blocks(
            dim, fix_lengths(layers, max_length), options, causal=False, num_heads=num_heads, device=device, dtype=dtype
        )
        self.norm = create_norm("none" if placement == "post" else norm, dim, device=device, dtype=dtype)
        widths = (COMBINATIONS[combine] * dim, hidden, hidden // 2, num_classes)
        self.head = nn.ModuleList(nn.Linear(before, after, device=device, dtype=dtype) for before, after in pairwise(widths))

    def encode(self, inputs: Int[Tensor, "b n"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b c"]:
        """One vector a sequence.

        Args:
            inputs: token ids, (batch, n).
            mask: (batch, n), True marks a real token.
        """
        check_mask("mask", mask, tuple(inputs.shape))
        self.position.check_length(inputs.shape[1])
        positions = token_positions(*inputs.shape, mask, device=inputs.device)
        tokens = Tokens(self.position(self.embedding(inputs), positions), mask)
        for block in self.blocks:
            tokens = block(tokens)
        return pool_tokens(self.norm(tokens.x, mask), mask, self.pool)

    def forward(
        self,
        inputs: Int[Tensor, "b n"],
        *,
        context: Int[Tensor, "b m"],
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b k"]:
        """Class logits of each pair.

        Args:
            inputs: ids of the first sequence, (batch, n).
            context: ids of the second, (batch, m).
            mask: (batch, n), True marks a real token of the first.
            context_mask: (batch, m), likewise of the second.
        """
        one, two = self.encode(inputs, mask=mask), self.encode(context, mask=context_mask)
        y = torch.cat((one, two) if self.combine == "concat" else (one, two, one * two, one - two), dim=-1)
        first, second, last = self.head
        return last(F.relu(second(F.relu(first(y)))))
