"""The MetaFormer block: norm, mixer, residual, norm, channel mixer, residual, with slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.channel_mixers import ChannelMixer
from attnlab.core.contract import Mixer
from attnlab.core.errors import UnknownNameError, UnsupportedError, nearest
from attnlab.core.grid import Grid
from attnlab.core.masks import zero_masked
from attnlab.core.state import State
from attnlab.core.tokens import Tokens
from attnlab.models.norms import create_norm
from attnlab.models.residual import Residual

PLACEMENTS = ("pre", "post", "sandwich")
"""Where the norms of a block may stand."""


class Block(nn.Module):
    r"""A token mixer $M$ and a channel mixer $C$ around one residual stream (Yu et al. 2022), norms $N$.

    ========  =====================================  =============================
    pre       $x \leftarrow x + M(N_1 x)$            $x \leftarrow x + C(N_2 x)$
    post      $x \leftarrow N_1(x + M x)$            $x \leftarrow N_2(x + C x)$
    sandwich  $x \leftarrow x + N_1' M(N_1 x)$       $x \leftarrow x + N_2' C(N_2 x)$
    ========  =====================================  =============================

    In parallel form both read the same $N_1 x$ and are added together. Masked tokens are exactly zero throughout.

    Args:
        dim: width of the tokens.
        mixer: the token mixer.
        channel_mixer: the channel mixer, or None for a block without.
        norm: "layer_norm", "rms_norm", "simple_rms_norm", "group_norm" or "none".
        placement: "pre", "post" or "sandwich".
        parallel: both branches from one norm, added at once.
        layer_scale: initial LayerScale of both branches, or None.
        drop_path: probability with which training drops a branch of an example.
        gates: modules of (stream, branch) to branch for the two branches, or None.
        between: a module of `Tokens` to `Tokens` between mixer and channel mixer (token reduction, say).
        generator: what stochastic depth draws from, by default torch's own.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnknownNameError: for an unknown norm or placement.
        UnsupportedError: for a norm or channel mixer that reads other tokens beside a causal mixer.
        ValueError: for ``parallel`` without a channel mixer or with ``between``, or if the widths differ.
    """

    def __init__(
        self,
        dim: int,
        mixer: Mixer,
        channel_mixer: ChannelMixer | None = None,
        *,
        norm: str = "layer_norm",
        placement: str = "pre",
        parallel: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        gates: tuple[nn.Module | None, nn.Module | None] = (None, None),
        between: nn.Module | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if placement not in PLACEMENTS:
            hint = nearest(placement, PLACEMENTS)
            raise UnknownNameError(f"placement: expected one of {PLACEMENTS}, got {placement!r}{hint}")
        for name, part in (("mixer", mixer), ("channel_mixer", channel_mixer)):
            if part is not None and part.dim != dim:
                raise ValueError(f"{name}: expected width {dim} as the block, got {part.dim}")
        if parallel and (channel_mixer is None or between is not None):
            raise ValueError("parallel: expected a channel mixer and nothing between it and the mixer")
        if mixer.causal and channel_mixer is not None and not channel_mixer.per_token:
            raise UnsupportedError(type(channel_mixer).__name__, "a causal block", "it reads a token's neighbours")
        self.dim, self.norm, self.placement, self.parallel = dim, norm, placement, parallel
        self.mixer, self.channel_mixer, self.between = mixer, channel_mixer, between

        def make(wanted: bool) -> nn.Module:
            return create_norm(norm if wanted else "none", dim, causal=mixer.causal, device=device, dtype=dtype)

        second = channel_mixer is not None
        self.mixer_norm, self.mixer_post_norm = make(True), make(placement == "sandwich")
        self.channel_norm, self.channel_post_norm = make(second and not parallel), make(second and placement == "sandwich")
        self.mixer_residual, self.channel_residual = (
            Residual(dim, layer_scale=scale, drop_path=drop_path, gate=gate, generator=generator, device=device, dtype=dtype)
            for scale, gate in zip((layer_scale, layer_scale if second else None), gates, strict=True)
        )

    @property
    def streams(self) -> bool:
        """Whether `init_state` and `extend` work: a causal mixer that streams, and nothing else that reads other tokens."""
        alone = self.channel_mixer is None or self.channel_mixer.per_token
        return self.mixer.supports.streaming and self.mixer.causal and alone and self.between is None

    def forward(self, tokens: Tokens) -> Tokens:
        """One block over all tokens.

        The mixer sees the grid if it supports the grid's rank and no prefix token stands outside it, otherwise the raster
        sequence. A mask that the mixer does not support is refused by it. Packed tokens (`attnlab.pack`) stay packed.

        Raises:
            UnsupportedError: for packed tokens if `packs` is False.
        """
        if tokens.cu_seqlens is not None:
            return self._forward_packed(tokens, tokens.cu_seqlens)
        grid = self._grid(tokens)
        return self._run(tokens, lambda x: self.mixer(x, mask=tokens.mask, grid=grid))

    @property
    def packs(self) -> bool:
        """Whether packed tokens are taken: a mixer of variable lengths, and nothing else that reads other tokens."""
        alone = self.channel_mixer is None or self.channel_mixer.per_token
        whole = self.norm != "group_norm" and not (self.training and self.mixer_residual.drop_path > 0.0)
        return self.mixer.supports.varlen and alone and whole and self.between is None

    def _forward_packed(self, tokens: Tokens, cu_seqlens: Int[Tensor, "s"]) -> Tokens:
        if not self.packs:
            why = "the mixer needs a padded batch, or a norm, channel mixer, stochastic depth or `between` counts examples"
            raise UnsupportedError(self.mixer.info.name, "packed tokens in this block", why)
        return self._run(tokens, lambda x: self.mixer.packed(x[0], cu_seqlens)[None])

    def init_state(self, batch_size: int) -> State:
        """The mixer's state before the first token."""
        self._check_streams()
        return self.mixer.init_state(batch_size)

    def extend(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """The next n >= 1 tokens of a sequence.

        Args:
            x: the tokens, (batch, n, dim).
            state: what `init_state` or the last call returned.
            mask: (batch, n), True marks a real token.

        Returns:
            The outputs (batch, n, dim) and the state after them.
        """
        self._check_streams()
        after = state

        def mix(branch: Tensor) -> Tensor:
            nonlocal after
            y, after = self.mixer.extend(branch, state, mask=mask)
            return y

        return self._run(Tokens(x, mask), mix).x, after

    def _run(self, tokens: Tokens, mix: Callable[[Tensor], Tensor]) -> Tokens:
        tokens = tokens.with_x(zero_masked(tokens.x, tokens.mask))
        if self.parallel:
            return self._run_parallel(tokens, mix)
        x, mask = tokens.x, tokens.mask
        f = mix(x if self.placement == "post" else self.mixer_norm(x, mask))
        x = self.mixer_residual(x, self.mixer_post_norm(f, mask))
        if self.placement == "post":
            x = self.mixer_norm(x, mask)
        tokens = tokens.with_x(x)
        if self.between is not None:
            tokens = self.between(tokens)
        if self.channel_mixer is None:
            return tokens
        x, mask = tokens.x, tokens.mask
        f = self._mix_channels(x if self.placement == "post" else self.channel_norm(x, mask), tokens)
        x = self.channel_residual(x, self.channel_post_norm(f, mask))
        if self.placement == "post":
            x = self.channel_norm(x, mask)
        return tokens.with_x(zero_masked(x, mask))

    def _run_parallel(self, tokens: Tokens, mix: Callable[[Tensor], Tensor]) -> Tokens:
        x, mask = tokens.x, tokens.mask
        h = x if self.placement == "post" else self.mixer_norm(x, mask)
        mixed = self.mixer_post_norm(mix(h), mask)
        channels = self.channel_post_norm(self._mix_channels(h, tokens), mask)
        y = x + self.mixer_residual.branch(x, mixed) + self.channel_residual.branch(x, channels)
        if self.placement == "post":
            y = self.mixer_norm(y, mask)
        return tokens.with_x(zero_masked(y, mask))

    def _mix_channels(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self.channel_mixer is None:
            raise RuntimeError("the block has no channel mixer")
        return self.channel_mixer(x, mask=tokens.mask, grid=None if tokens.num_prefix else tokens.grid)

    def _grid(self, tokens: Tokens) -> Grid | None:
        if tokens.grid is None or tokens.num_prefix or len(tokens.grid) not in self.mixer.supports.grid:
            return None
        return tokens.grid

    def _check_streams(self) -> None:
        if not self.streams:
            raise UnsupportedError(
                self.mixer.info.name, "streaming in this block", "the mixer, the channel mixer or `between` reads later tokens"
            )
