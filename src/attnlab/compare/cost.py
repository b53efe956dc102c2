"""What a layer costs by counting: floating-point operations, and bytes of streaming state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from attnlab.compare.layers import Layer, build_layer, random_input
from attnlab.core.catalog import mixer_info

aten = torch.ops.aten


def _added_products(c: Any, a: Any, b: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def _cpu_flash(q: Any, k: Any, v: Any, dropout: Any = 0.0, causal: bool = False, *rest: Any, **options: Any) -> int:
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]) // (2 if causal else 1)


def layer_flops(layer: Layer, tokens: int) -> int:
    """Floating-point operations of matrix products and convolutions in one forward pass; element-wise work is not counted."""
    # PyTorch's counter knows neither its own CPU flash kernel nor products that add to a given tensor in place.
    more = {
        aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash,
        aten.baddbmm_: _added_products,
        aten.addmm_: _added_products,
        aten.addbmm_: _added_products,
    }
    mixer = build_layer(layer).eval()
    x, grid = random_input(layer, tokens)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=more) as counter:
        mixer(x, grid=grid)
    return int(counter.get_total_flops())


def state_bytes(layer: Layer, tokens: int) -> int | None:
    """Bytes of streaming state a sequence after so many tokens; None where the mixer does not stream."""
    if not (layer.causal and mixer_info(layer.name).supports.streaming):
        return None
    mixer = build_layer(layer).eval()
    x, _ = random_input(layer, tokens)
    with torch.no_grad():
        _, state = mixer.extend(x[:1], mixer.init_state(1))
    return state.nbytes
