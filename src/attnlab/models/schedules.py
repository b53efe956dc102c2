"""Layer schedules: which mixer stands in which layer of a model; `list_schedules` names them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from attnlab.core.info import Info
from attnlab.core.registry import Registry

schedules: Registry[list[str]] = Registry("schedule", "attnlab.models")


def create_schedule(name: str, depth: int, **options: Any) -> list[str]:
    """The mixers of all layers, the first one lowest: ``create_schedule("full_at_bottom", depth=8, num_full=2)``.

    Raises:
        UnknownNameError: for an unknown schedule or option; the nearest ones are named.
        ValueError: for a depth that is not positive, or what the schedule cannot place.
    """
    return schedules.create(name, depth=depth, **options)


def list_schedules(pattern: str = "*") -> list[str]:
    """Names of schedules that match a shell pattern."""
    return schedules.names(pattern)


def schedule_info(name: str) -> Info:
    """Summary, paper and options of a schedule."""
    return schedules.info(name)


def _placed(depth: int, full: str, local: str, where: Collection[int]) -> list[str]:
    """``full`` in the layers ``where``, counted from 0, ``local`` in the others."""
    if depth < 1:
        raise ValueError(f"depth: expected a positive integer, got {depth}")
    return [full if layer in where else local for layer in range(depth)]


@schedules.register("full_at_bottom", paper="masformer")
def full_at_bottom(
    depth: int, *, full: str = "softmax", local: str = "sliding_window", num_full: int | None = None, place: str = "bottom"
) -> list[str]:
    """A few layers of full attention below, local attention in all others (Zhang et al. 2023, MASFormer).

    Attention costs (l n^2 + (L - l) n b) / (L n^2) of what full attention in all L layers costs, with l full layers and b keys
    in the span of the others.

    Args:
        depth: L, layers.
        full: the mixer with full attention.
        local: the mixer of the other layers. The paper's sparse layers are blocked, a token sees its block of 1024 and the one
            before: "block_span". A causal "sliding_window" of as many keys comes near, and differs at the blocks' borders.
        num_full: l; by default a sixth of the layers, as 4 of 24 in the paper, at least 1.
        place: where the full layers stand: "bottom", or "middle" or "top", which the paper found worse.

    Raises:
        ValueError: for more full layers than there are, or an unknown place.
    """
    num_full = max(1, depth // 6) if num_full is None else num_full
    if not 0 <= num_full <= depth:
        raise ValueError(f"num_full: expected 0 to depth={depth}, got {num_full}")
    starts = {"bottom": 0, "middle": (depth - num_full) // 2, "top": depth - num_full}
    if place not in starts:
        raise ValueError(f"place: expected one of {list(starts)}, got {place!r}")
    return _placed(depth, full, local, range(starts[place], starts[place] + num_full))


@schedules.register("interleaved", paper="deconstructing-attention", partial=True)
def interleaved(depth: int, *, full: str = "softmax", local: str = "linear", every: int = 2) -> list[str]:
    """Full attention in every k-th layer, counted from 1; the other mixer between.

    With 2, the hybrids of the paper: the simple variant in odd layers, standard attention in even ones.

    Args:
        depth: layers.
        full: the mixer of layers k, 2 k, ...
        local: the mixer of the other layers.
        every: k.

    Raises:
        ValueError: for an interval below 1.
    """
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    return _placed(depth, full, local, range(every - 1, depth, every))


@schedules.register("quarter_softmax", paper="lasp2", partial=True)
def quarter_softmax(depth: int, *, full: str = "softmax", local: str = "linear") -> list[str]:
    """Softmax attention in every fourth layer, linear attention in the other three (Sun et al. 2025, LASP-2H).

    The share is the paper's; that the softmax layer comes last of the four is ours.

    Args:
        depth: layers.
        full: the mixer of every fourth layer.
        local: the mixer of the other layers.
    """
    return interleaved(depth, full=full, local=local, every=4)


@schedules.register("delta_hybrid", paper="deltanet", partial=True)
def delta_hybrid(
    depth: int, *, form: str = "window", full: str = "softmax", window: str = "sliding_window", local: str = "delta_net"
) -> list[str]:
    """DeltaNet with a few layers of softmax attention (Yang et al. 2024).

    Args:
        depth: layers.
        form: "window" attends in every second layer, "global" in the 2nd and in the one after the middle (L / 2 + 1).
        full: the attention of the form "global".
        window: the attention of the form "window"; the paper's sees 2048 keys.
        local: the mixer of the other layers.

    Raises:
        ValueError: for an unknown form.
    """
    if form not in ("window", "global"):
        raise ValueError(f"form: expected 'window' or 'global', got {form!r}")
    if form == "window":
        return interleaved(depth, full=window, local=local, every=2)
    return _placed(depth, full, local, {1, depth // 2})
