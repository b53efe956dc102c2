"""Modifiers: what changes a finished module in place, its weights or its layers; `list_modifiers` names them."""

from __future__ import annotations

from attnlab.modifiers.registry import apply_modifier, list_modifiers, modifier_info, modifiers

__all__ = ["apply_modifier", "list_modifiers", "modifier_info", "modifiers"]
