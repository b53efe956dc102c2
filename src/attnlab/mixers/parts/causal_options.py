"""The options of attention that has no other form than the causal one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch


class CausalOptions(TypedDict, total=False):
    """`AttentionOptions` without ``causal``, which such a mixer names itself, with True as its default."""

    num_kv_heads: int | None
    head_dim: int | None
    context_dim: int | None
    qkv_bias: bool
    out_bias: bool
    qk_norm: str
    position: str
    position_options: Mapping[str, Any] | None
    device: torch.device | None
    dtype: torch.dtype | None
