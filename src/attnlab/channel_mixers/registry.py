"""The registry of channel mixers and its three verbs."""

from __future__ import annotations

from typing import Any

from attnlab.channel_mixers.contract import ChannelMixer
from attnlab.core.info import Info
from attnlab.core.registry import Registry

channel_mixers: Registry[ChannelMixer] = Registry("channel_mixer", "attnlab.channel_mixers")


def create_channel_mixer(name: str, dim: int, **options: Any) -> ChannelMixer:
    """Build a registered channel mixer: ``create_channel_mixer("swiglu", dim=256, hidden=512)``.

    Raises:
        UnknownNameError: for an unknown name or option; the nearest ones are named.
    """
    return channel_mixers.create(name, dim=dim, **options)


def list_channel_mixers(pattern: str = "*") -> list[str]:
    """Names of channel mixers that match a shell pattern."""
    return channel_mixers.names(pattern)


def channel_mixer_info(name: str) -> Info:
    """Summary and options of a channel mixer."""
    return channel_mixers.info(name)
