"""Positions: parts that attention mixers take by name; they turn queries and keys, or add a bias to the logits."""

from __future__ import annotations

from attnlab.positions.base import NoPosition, Position, create_position, positions

__all__ = ["NoPosition", "Position", "create_position", "positions"]
