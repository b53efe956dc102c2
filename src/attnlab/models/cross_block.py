"""The decoder block around a cross mixer, and which mixers may stand in it."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from attnlab.channel_mixers import ChannelMixer
from attnlab.core.catalog import alternatives, create_mixer, mixer_info, mixers
from attnlab.core.contract import Mixer
from attnlab.core.errors import UnsupportedError
from attnlab.core.masks import zero_masked
from attnlab.core.tokens import Tokens
from attnlab.models.norms import create_norm
from attnlab.models.stack import require_sequence

_QUERIES, _KEYS, _WIDTH, _HEADS = 12, 10, 16, 4


class CrossBlock(nn.Module):
    r"""Tokens $x$ that read a context $z$ through a cross mixer $M$, then a channel mixer $C$; norms $N$ before both.

    $$x \leftarrow x + M(N_1 x, z), \qquad x \leftarrow x + C(N_2 x)$$

    Args:
        dim: width of the tokens.
        mixer: a mixer that supports ``context``.
        channel_mixer: the channel mixer, or None for a block without.
        norm: as `create_norm` names them.
        causal: whether the model must not see later tokens; then norm and channel mixer look at each token alone.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: for a norm or a channel mixer that reads other tokens where causal.
    """

    def __init__(
        self,
        dim: int,
        mixer: Mixer,
        channel_mixer: ChannelMixer | None = None,
        *,
        norm: str = "layer_norm",
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if causal and channel_mixer is not None and not channel_mixer.per_token:
            raise UnsupportedError(type(channel_mixer).__name__, "a causal block", "it reads a token's neighbours")
        self.mixer, self.channel_mixer = mixer, channel_mixer
        self.mixer_norm = create_norm(norm, dim, causal=causal, device=device, dtype=dtype)
        second = norm if channel_mixer is not None else "none"
        self.channel_norm = create_norm(second, dim, causal=causal, device=device, dtype=dtype)

    def forward(self, tokens: Tokens, context: Tokens) -> Tokens:
        """The tokens after they have read the context, zero at masked ones."""
        mask = tokens.mask
        x = zero_masked(tokens.x, mask)
        x = x + self.mixer(self.mixer_norm(x, mask), context.x, mask=mask, context_mask=context.mask)
        if self.channel_mixer is not None:
            x = x + self.channel_mixer(self.channel_norm(x, mask), mask=mask)
        return tokens.with_x(zero_masked(x, mask))


def require_cross(name: str, *, causal: bool) -> None:
    """UnsupportedError, naming those that can, if the mixer ``name`` cannot read a second sequence.

    Args:
        name: a registered mixer.
        causal: also that later queries make no difference to earlier ones, as in a decoder.
    """
    info = mixer_info(name)
    if not info.supports.cross:
        why = "its keys and values come from the tokens themselves"
        raise UnsupportedError(name, "a second sequence to read", why, alternatives(info, cross=True, grid=1))
    require_sequence(info, cross=True)
    if causal and not queries_stand_alone(name):
        able = [other for other in mixers.names(cross=True, grid=1) if queries_stand_alone(other)]
        able.sort(key=lambda other: (mixer_info(other).family != info.family, other))
        raise UnsupportedError(
            name, "causal queries of a second sequence", "what a query reads depends on the other queries", able[:5]
        )


@cache
def queries_stand_alone(name: str) -> bool:
    """Whether a cross mixer answers each query without the others: measured on a small instance with random inputs.

    The first queries are answered once among all and once by themselves, the context being the same: the causal pattern test of
    CAB (Zhang et al. 2022), in float64, where nothing but rounding may differ.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.default_generator.manual_seed(0)
        example = dict(mixer_info(name).example)
        mixer = create_mixer(name, _WIDTH, _HEADS, **{**example, "dtype": torch.float64}).eval()
        x, context = (torch.randn(3, length, _WIDTH, dtype=torch.float64) for length in (_QUERIES, _KEYS))
        whole = mixer(x, context)
        return all(
            torch.allclose(mixer(x[:, :count], context), whole[:, :count], rtol=1e-9, atol=1e-9) for count in range(1, _QUERIES)
        )
