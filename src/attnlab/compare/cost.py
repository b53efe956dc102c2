"""What a layer costs by counting: floating-point operations, and bytes of streaming state."""

from __future__ import annotations

import torch

from attnlab.compare.layers import Layer, build_layer, can_stream, random_input
from attnlab.models.flops import count_flops


def layer_flops(layer: Layer, tokens: int) -> int:
    """Floating-point operations of matrix products and convolutions in one forward pass; element-wise work is not counted."""
    mixer = build_layer(layer, tokens).eval()
    x, grid = random_input(layer, tokens)
    return count_flops(lambda: mixer(x, grid=grid))


def state_bytes(layer: Layer, tokens: int) -> int | None:
    """Bytes of streaming state a sequence after so many tokens; None where the mixer does not stream."""
    if not can_stream(layer):
        return None
    mixer = build_layer(layer, tokens).eval()
    x, _ = random_input(layer, tokens)
    with torch.no_grad():
        _, state = mixer.extend(x[:1], mixer.init_state(1))
    return state.nbytes
