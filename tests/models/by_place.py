"""Mixers whose streams count blocks, pages and sinks by place."""

from __future__ import annotations

BY_PLACE = ("block_span", "core_context_aware", "elastic_span", "quest", "snap_kv")
"""They read what a stream has seen in the places where it stood, real or not, so padding belongs on the right; each says so."""
