"""What travels between blocks and reducers: tokens and what belongs to them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.core.grid import Grid


@dataclass(frozen=True)
class Tokens:
    """Tokens between two blocks.

    Args:
        x: the tokens, (batch, n, channels).
        mask: True marks a real token.
        grid: sides whose product is n without the prefix, or None for a plain sequence.
        num_prefix: leading tokens outside the grid (class and register tokens).
        sizes: how many original tokens each stands for, after merging.
        source: for each original token, the index of the token that holds it now.
        streams: tensors that mixers hand to later blocks, by name (score maps, global tokens).
        cu_seqlens: set where the tokens are packed: x is (1, total, channels), sequence s lies at cu_seqlens[s : s + 2].
    """

    x: Float[Tensor, "b n c"]
    mask: Bool[Tensor, "b n"] | None = None
    grid: Grid | None = None
    num_prefix: int = 0
    sizes: Float[Tensor, "b n"] | None = None
    source: Int[Tensor, "b n0"] | None = None
    streams: dict[str, Tensor] = field(default_factory=dict)
    cu_seqlens: Int[Tensor, "s"] | None = None

    def with_x(self, x: Float[Tensor, "b n c"]) -> Tokens:
        """The same tokens with other features."""
        return replace(self, x=x)


def sequence_lengths(cu_seqlens: Int[Tensor, "s"], total: int) -> list[int]:
    """The lengths between cumulative ones.

    Raises:
        TypeError: if it is not a tensor of integers.
        ValueError: if it does not rise from 0 to ``total``.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise TypeError(
            f"cu_seqlens: expected a tensor of integers, got {getattr(cu_seqlens, 'dtype', type(cu_seqlens).__name__)}"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: expected one dimension and at least 2 entries, got shape {tuple(cu_seqlens.shape)}")
    starts: list[int] = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != total or min(lengths) < 1:
        raise ValueError(f"cu_seqlens: expected to rise from 0 to {total} (the tokens of x), got {starts[:8]}")
    return lengths


def pack(tokens: Tokens) -> Tokens:
    """The real tokens of a batch one behind the other, (1, total, channels); the inverse is `unpack`.

    Gaps inside a sequence are closed: what counts places (convolutions, windows, distances) sees neighbours where there was
    padding between.

    Raises:
        ValueError: if an example has no real token, or the tokens have a grid, a prefix or streams, which a line cannot carry.
    """
    if tokens.grid is not None or tokens.num_prefix or tokens.streams or tokens.sizes is not None or tokens.source is not None:
        raise ValueError("tokens: expected plain sequences to pack, got a grid, a prefix, sizes or streams")
    batch, n = tokens.x.shape[:2]
    mask = tokens.x.new_ones(batch, n, dtype=torch.bool) if tokens.mask is None else tokens.mask
    lengths = mask.sum(dim=1)
    if int(lengths.min()) < 1:
        raise ValueError("mask: expected at least one real token in every example to pack, got none in some")
    return Tokens(tokens.x[mask][None], cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)))


def unpack(packed: Tokens, mask: Bool[Tensor, "b n"]) -> Tokens:
    """Packed tokens back at the places where ``mask`` is True, zeros elsewhere.

    Raises:
        ValueError: if they are not packed, or are not as many as ``mask`` has places.
    """
    if packed.cu_seqlens is None:
        raise ValueError("packed: expected tokens with cu_seqlens, as pack returns them")
    if int(mask.sum()) != packed.x.shape[1]:
        raise ValueError(f"mask: expected {packed.x.shape[1]} real tokens as were packed, got {int(mask.sum())}")
    x = packed.x.new_zeros((*mask.shape, packed.x.shape[-1])).masked_scatter(mask.unsqueeze(-1), packed.x[0])
    return Tokens(x, mask=mask)
