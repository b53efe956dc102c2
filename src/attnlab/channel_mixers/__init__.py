"""Channel mixers: what a block does to each token alone, after the token mixer; `list_channel_mixers` names them."""

from __future__ import annotations

from attnlab.channel_mixers.contract import ChannelMixer
from attnlab.channel_mixers.registry import channel_mixer_info, channel_mixers, create_channel_mixer, list_channel_mixers

__all__ = ["ChannelMixer", "channel_mixer_info", "channel_mixers", "create_channel_mixer", "list_channel_mixers"]
