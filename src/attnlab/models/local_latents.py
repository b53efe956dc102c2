"""FIT: tokens attend inside their group, a few latents of each group attend to all, and the two read each other in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import create_mixer
from attnlab.core.grid import Grid
from attnlab.core.masks import zero_masked
from attnlab.core.tokens import Tokens
from attnlab.core.windows import Windows
from attnlab.models.embedding import PositionEmbedding
from attnlab.models.norms import create_norm
from attnlab.models.registry import models
from attnlab.models.stack import BlockOptions, build_blocks, layer_schedule


@models.register("local_latents", paper="fit")
class LocalLatents(nn.Module):
    r"""Interleaved layers of tokens in groups and of latents (Chen and Li 2023, FIT, section 2).

    With tokens X in t groups (b, t, s, c), latents Z (b, t, m, D), at first learned, and $\mathrm{Layer}$ being norm, attention,
    residual, norm, MLP, residual, for each stage (l, g)

    $$X \leftarrow \mathrm{Layer}^l(X)\ \text{in each group}, \qquad
      Z \leftarrow Z + \mathrm{Attn}(\mathrm{LN}\,Z;\, \mathrm{LN}\,X)\ \text{in each group},$$
    $$Z \leftarrow \mathrm{Layer}^g(Z)\ \text{over all groups}, \qquad
      X \leftarrow X + \mathrm{Attn}(\mathrm{LN}\,X;\, \mathrm{LN}\,Z)\ \text{in each group, but in the last stage.}$$

    The output is LN X, and LN Z as the stream "latents". With ``causal=True`` (FIT-AR) the layers of X are causal, those of Z
    see the latents of their own group and of those before, and tokens read the latents of the group before theirs. Time
    O(n s c + (t m)^2 D) beside linear layers: with the best s it is O(n^(4/3)).

    Args:
        dim: c.
        latent_dim: D.
        group: the side of a group on each axis of the grid, such as (16,) or (4, 4); ends that fill no group are smaller ones.
        num_latents: m.
        stages: (l, g) of each stage; "(2)4(2)4" in the paper is ((2, 4), (2, 4)).
        num_heads: of the layers of X.
        latent_heads: of those of Z; reading and writing have the smaller number, and the smaller of both widths.
        causal: no token sees a later one; for sequences.
        mixer: a registered mixer for X.
        mixer_options: its own options, such as a position inside the group.
        channel_options: options of the MLPs.
        position: of the groups, added to the first latents: "none", "learned" or "sinusoidal".
        max_groups: groups that learned positions reach.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for sizes out of their range; in use, for a grid of another rank than the groups, or tokens with a prefix.
        UnsupportedError: with ``causal=True``, for a mixer that cannot be causal.

    Differs from the paper: groups are cut from the first place on, real or not; those without a real token have no latents, and
    the first group of FIT-AR reads nothing, where the authors let it read zeros. LN has an epsilon of 1e-5. Embeddings and heads
    are not here.
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        group: Grid,
        num_latents: int,
        stages: Sequence[tuple[int, int]],
        num_heads: int = 8,
        latent_heads: int = 8,
        *,
        causal: bool = False,
        mixer: str = "softmax",
        mixer_options: Mapping[str, Any] | None = None,
        channel_options: Mapping[str, Any] | None = None,
        position: str = "sinusoidal",
        max_groups: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group, self.num_latents, self.causal = tuple(group), num_latents, causal
        if not self.group or min(self.group) < 1 or (causal and len(self.group) > 1):
            raise ValueError(f"group: expected positive sides, one if causal, got {self.group}")
        if num_latents < 1:
            raise ValueError(f"num_latents: expected at least 1, got {num_latents}")
        if not stages or any(len(depths) != 2 or min(depths) < 0 for depths in stages):
            raise ValueError(f"stages: expected at least one pair of numbers of layers, got {stages}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latents = nn.Parameter(torch.empty(num_latents, latent_dim, **place).normal_(std=0.02))
        self.position = PositionEmbedding(position, latent_dim, max_groups, **place)
        overall = ("chunk_causal", {"chunk": num_latents}) if causal else ("softmax", {})
        options = BlockOptions("mlp", channel_options or {}, "layer_norm")

        def layers(width: int, depth: int, name: str, own: Mapping[str, Any], heads: int, ordered: bool) -> nn.ModuleList:
            schedule = layer_schedule(depth, name, own) if depth else []
            return build_blocks(width, schedule, options, causal=ordered, num_heads=heads, **place)

        heads, width = min(num_heads, latent_heads), min(dim, latent_dim)
        last = len(stages) - 1
        self.stages = nn.ModuleList()
        for i, (local, wide) in enumerate(stages):
            read = CrossAttention(latent_dim, dim, heads, width // heads, **place)
            write = CrossAttention(dim, latent_dim, heads, width // heads, **place) if i < last else None
            near = layers(dim, local, mixer, mixer_options or {}, num_heads, causal)
            self.stages.append(Stage(near, read, layers(latent_dim, wide, *overall, latent_heads, False), write))
        self.norm, self.latents_norm = (create_norm("layer_norm", size, causal=causal, **place) for size in (dim, latent_dim))

    def forward(self, tokens: Tokens) -> Tokens:
        """All stages.

        Raises:
            ValueError: for a grid of another rank than the groups, or tokens with a prefix.
        """
        b, n, _ = tokens.x.shape
        grid = (n,) if tokens.grid is None else tokens.grid
        if tokens.num_prefix or len(grid) != len(self.group):
            raise ValueError(f"tokens: expected a grid of rank {len(self.group)} and no prefix, got {grid}, {tokens.num_prefix}")
        windows = Windows(grid, self.group)
        x = windows.split(zero_masked(tokens.x, tokens.mask))
        mask = tokens.x.new_ones(b, n, dtype=torch.bool) if tokens.mask is None else tokens.mask
        real = windows.split(mask.unsqueeze(-1)).squeeze(-1)
        count, m = x.shape[1], self.num_latents
        alive = real.any(-1, keepdim=True).expand(-1, -1, m)
        z = self.latents.expand(b, count, -1, -1) + self._places(count).unsqueeze(2)
        x, z, real = x.flatten(0, 1), zero_masked(z.flatten(0, 1), alive.flatten(0, 1)), real.flatten(0, 1)
        own, before = alive.flatten(0, 1), self._before(alive).flatten(0, 1)
        for stage in cast("list[Stage]", list(self.stages)):
            x = _run(stage.tokens, x, real)
            z = stage.read(z, x, own, real)
            z = _run(stage.latents, z.view(b, count * m, -1), alive.flatten(1)).view(z.shape)
            if stage.write is not None:
                x = stage.write(x, self._before(z.unflatten(0, (b, count))).flatten(0, 1), real, before)
        y = self.norm(windows.merge(x.unflatten(0, (b, count))), tokens.mask)
        latents = self.latents_norm(z, own).view(b, count, m, -1)
        return replace(tokens, x=y, streams={**tokens.streams, "latents": latents})

    def _before(self, x: Tensor) -> Tensor:
        """What tokens of each group may read, (b, t, m, ...): its own, or that of the group before; nothing for the first."""
        return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1) if self.causal else x

    def _places(self, count: int) -> Float[Tensor, "1 t d"]:
        """The positions of the groups."""
        self.position.check_length(count)
        zeros = self.latents.new_zeros(1, count, self.latents.shape[1])
        return self.position(zeros, torch.arange(count, device=zeros.device)[None])


class Stage(nn.Module):
    """The layers of tokens and of latents between two readings.

    Args:
        tokens: blocks of the tokens of a group.
        read: latents read tokens.
        latents: blocks of all latents.
        write: tokens read latents; None in the last stage.
    """

    def __init__(self, tokens: nn.ModuleList, read: CrossAttention, latents: nn.ModuleList, write: CrossAttention | None) -> None:
        super().__init__()
        self.tokens, self.read, self.latents, self.write = tokens, read, latents, write


class CrossAttention(nn.Module):
    r"""$x + \mathrm{Attn}(\mathrm{LN}\,x;\, \mathrm{LN}\,y)$: one stream reads another, without an MLP.

    Args:
        dim: width of x.
        context_dim: width of y.
        num_heads: heads.
        head_dim: width of each.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm, self.context_norm = (create_norm("layer_norm", size, causal=False, **place) for size in (dim, context_dim))
        self.mixer = create_mixer("softmax", dim, num_heads, context_dim=context_dim, head_dim=head_dim, **place)

    def forward(
        self, x: Float[Tensor, "r n c"], y: Float[Tensor, "r m d"], mask: Bool[Tensor, "r n"], context_mask: Bool[Tensor, "r m"]
    ) -> Float[Tensor, "r n c"]:
        """Read once; where nothing is to be read, nothing is added."""
        return x + self.mixer(self.norm(x, mask), self.context_norm(y, context_mask), mask=mask, context_mask=context_mask)


def _run(blocks: nn.ModuleList, x: Float[Tensor, "r n c"], real: Bool[Tensor, "r n"]) -> Float[Tensor, "r n c"]:
    """Blocks on rows of tokens."""
    carried = Tokens(x, real)
    for block in blocks:
        carried = block(carried)
    return carried.x
