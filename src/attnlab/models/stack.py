"""A stack of blocks from names: which mixer in which layer, with what options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attnlab.channel_mixers import create_channel_mixer
from attnlab.core.catalog import alternatives, create_mixer, mixer_info
from attnlab.core.contract import Mixer
from attnlab.core.errors import UnsupportedError
from attnlab.core.info import MixerInfo
from attnlab.models.block import Block
from attnlab.models.schedules import create_schedule

MixerNames = str | Sequence[str]
MixerOptions = Mapping[str, Any] | Sequence[Mapping[str, Any]]
ChannelOptions = Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a stack share.

    Args:
        channel_mixer: a registered channel mixer, or None for none.
        channel_options: its own options, such as ``hidden``: one mapping for all blocks, or one a block.
        norm: the norm of every block.
        placement: "pre", "post" or "sandwich".
        parallel: mixer and channel mixer side by side.
        layer_scale: initial LayerScale, or None.
        drop_path: stochastic depth of the last block; it rises linearly from 0 at the first.
        generator: what stochastic depth draws from.
    """

    channel_mixer: str | None = "mlp"
    channel_options: ChannelOptions = field(default_factory=dict)
    norm: str = "rms_norm"
    placement: str = "pre"
    parallel: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.0
    generator: torch.Generator | None = None

    def of_channels(self, depth: int) -> list[Mapping[str, Any]]:
        """The channel mixer's options in each block; ValueError if there are not as many as blocks."""
        if isinstance(self.channel_options, Mapping):
            return [self.channel_options] * depth
        if len(self.channel_options) != depth:
            raise ValueError(
                f"channel_options: expected one mapping, or {depth} as there are blocks, got {len(self.channel_options)}"
            )
        return list(self.channel_options)


def named_schedule(
    depth: int,
    schedule: str | None,
    schedule_options: Mapping[str, Any] | None,
    mixer: MixerNames,
    mixer_options: MixerOptions | None,
) -> list[tuple[str, dict[str, Any]]]:
    """`layer_schedule` of ``mixer``, or of the registered schedule where its name is given.

    Args:
        depth: layers.
        schedule: a name as `list_schedules` gives it, or None.
        schedule_options: its own options.
        mixer: as for `layer_schedule`, without a schedule.
        mixer_options: as for `layer_schedule`; with a schedule, a mapping from a mixer's name to its options.

    Raises:
        ValueError: for options without a schedule, mixers beside one, or options of a mixer that it does not place.
    """
    if schedule is None:
        if schedule_options:
            raise ValueError(f"schedule_options: expected none without a schedule, got {dict(schedule_options)}")
        return layer_schedule(depth, mixer, mixer_options)
    if mixer != "softmax":
        raise ValueError(f"mixer: expected none beside schedule={schedule!r}, which names the mixers, got {mixer!r}")
    names = create_schedule(schedule, depth, **(schedule_options or {}))
    own = {} if mixer_options is None else mixer_options
    if not isinstance(own, Mapping) or not set(own) <= set(names):
        placed = ", ".join(sorted(set(names)))
        raise ValueError(
            f"mixer_options: expected a mapping from mixers of {schedule!r} ({placed}) to their options, got {own!r}"
        )
    return [(name, dict(own.get(name, {}))) for name in names]


def layer_schedule(depth: int, mixer: MixerNames, options: MixerOptions | None) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the mixer in each of ``depth`` layers.

    Args:
        depth: layers.
        mixer: a name, or several that are repeated in turn.
        options: the options of all, or one mapping a name.

    Raises:
        ValueError: if ``depth`` is not positive, or the options are not as many as the names.
    """
    if depth < 1:
        raise ValueError(f"depth: expected a positive integer, got {depth}")
    names = [mixer] if isinstance(mixer, str) else list(mixer)
    if not names:
        raise ValueError("mixer: expected at least one name, got none")
    if options is None or isinstance(options, Mapping):
        each = [dict(options or {}) for _ in names]
    else:
        each = [dict(one) for one in options]
    if len(each) != len(names):
        raise ValueError(f"mixer_options: expected one mapping, or {len(names)} as there are mixers, got {len(each)}")
    return [(names[i % len(names)], each[i % len(names)]) for i in range(depth)]


def fix_lengths(schedule: Sequence[tuple[str, dict[str, Any]]], num_tokens: int | None) -> list[tuple[str, dict[str, Any]]]:
    """The schedule with the number of tokens given to each mixer that is built for one, unless its options say it.

    Raises:
        ValueError: if such a mixer is there and ``num_tokens`` is None.
    """
    fixed = []
    for name, own in schedule:
        option = mixer_info(name).supports.tokens_option
        if option is not None and option not in own:
            if num_tokens is None:
                raise ValueError(f"max_length, grid: expected one of them, the mixer {name!r} is built for a number of tokens")
            own = {**own, option: num_tokens}
        fixed.append((name, own))
    return fixed


def build_mixer(
    name: str,
    dim: int,
    options: Mapping[str, Any],
    *,
    causal: bool,
    num_heads: int | None,
    layer: int = 0,
    num_layers: int = 1,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Mixer:
    """The mixer ``name`` for a model.

    Args:
        name: a registered mixer.
        dim: width of the tokens.
        options: the mixer's own options.
        causal: whether the model is causal; a mixer that is always causal is so in any model.
        num_heads: heads, for mixers that have some; None takes the mixer's default.
        layer: where it stands, for mixers whose decay depends on it.
        num_layers: of the model, likewise.
        device: of the parameters.
        dtype: of the parameters.
    """
    known = {option.name for option in mixer_info(name).options}
    given: dict[str, Any] = {"num_heads": num_heads, "layer": layer, "num_layers": num_layers, "device": device, "dtype": dtype}
    wanted = {key: value for key, value in given.items() if value is not None and key in known}
    if causal and "causal" in known:
        wanted["causal"] = True
    return create_mixer(name, dim, **{**wanted, **options})


def require_causal(name: str) -> None:
    """UnsupportedError, naming those that can, if the mixer ``name`` has no causal form on sequences."""
    info = mixer_info(name)
    if info.supports.causal == "no":
        raise UnsupportedError(
            name, "a causal language model", "its definition reads the future", alternatives(info, causal=True, grid=1)
        )
    require_sequence(info, causal=True)


def require_sequence(info: MixerInfo, **also: object) -> None:
    """UnsupportedError if a mixer takes no flat sequence."""
    if 1 not in info.supports.grid:
        raise UnsupportedError(
            info.name,
            "a sequence of tokens",
            f"it needs a grid of rank {sorted(info.supports.grid)}",
            alternatives(info, grid=1, **also),
        )


def build_blocks(
    dim: int,
    schedule: Sequence[tuple[str, Mapping[str, Any]]],
    options: BlockOptions,
    *,
    causal: bool,
    num_heads: int | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> nn.ModuleList:
    """One `Block` a layer of ``schedule``."""
    blocks = []
    of_channels = options.of_channels(len(schedule))
    for index, (name, own) in enumerate(schedule):
        mixer = build_mixer(
            name,
            dim,
            own,
            causal=causal,
            num_heads=num_heads,
            layer=index,
            num_layers=len(schedule),
            device=device,
            dtype=dtype,
        )
        channel = None
        if options.channel_mixer is not None:
            channel = create_channel_mixer(options.channel_mixer, dim, **{"device": device, "dtype": dtype, **of_channels[index]})
        block = Block(
            dim,
            mixer,
            channel,
            norm=options.norm,
            placement=options.placement,
            parallel=options.parallel,
            layer_scale=options.layer_scale,
            drop_path=options.drop_path * index / max(1, len(schedule) - 1),
            generator=options.generator,
            device=device,
            dtype=dtype,
        )
        blocks.append(block)
    return nn.ModuleList(blocks)
