"""The registry of token mixers and its three verbs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnlab.core.info import MixerInfo
from attnlab.core.registry import Registry

if TYPE_CHECKING:
    from attnlab.core.contract import Mixer

mixers: Registry[Mixer] = Registry("mixer", "attnlab.mixers")


def create_mixer(name: str, dim: int, num_heads: int | None = None, **options: Any) -> Mixer:
    """Build a registered mixer: ``create_mixer("delta_net", dim=256, num_heads=4, causal=True)``.

    Args:
        name: as `list_mixers` gives it.
        dim: width of the tokens.
        num_heads: heads; None takes the mechanism's default.
        **options: the mechanism's own options; `mixer_info(name).options` lists them.

    Raises:
        UnknownNameError: for an unknown mechanism or option; the nearest ones are named.
        UnsupportedError: for what the mechanism cannot be.
    """
    if num_heads is not None:
        options["num_heads"] = num_heads
    return mixers.create(name, dim=dim, **options)


def list_mixers(pattern: str = "*", *, family: str | None = None, **supports: object) -> list[str]:
    """Names of mixers that match.

    Args:
        pattern: a shell pattern on the name.
        family: the room, such as "linear".
        **supports: what they must support: ``causal=True, streaming=True, grid=2, cross=True, ...``.
    """
    return mixers.names(pattern, family=family, **supports)


def mixer_info(name: str) -> MixerInfo:
    """What is known of a mixer: summary, paper, options, promises."""
    info = mixers.info(name)
    if not isinstance(info, MixerInfo):
        raise TypeError(f"mixer {name!r} was registered without supports=")
    return info


def alternatives(info: MixerInfo, **wanted: object) -> list[str]:
    """Up to five mixers that support what ``info`` does not, those of its family first."""
    if not wanted:
        return []
    names = mixers.names(**wanted)  # type: ignore[arg-type]
    names.sort(key=lambda name: (mixers.info(name).family != info.family, name))
    return names[:5]
