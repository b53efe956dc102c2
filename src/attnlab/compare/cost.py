"""What a layer costs by counting: floating-point operations, and bytes of streaming state."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from attnlab.compare.layers import Layer, build_layer, can_stream, random_input

_ATEN = torch.ops.aten


def _cpu_flash(q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, **rest: Any) -> int:
    pairs = q.shape[:-1].numel() * k.shape[-2] // (2 if is_causal else 1)
    return 2 * pairs * (q.shape[-1] + v.shape[-1])


# PyTorch's table has neither its own CPU flash kernel nor products that add to a tensor in place.
_FLOPS = {
    **flop_registry,
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm],
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_flash,
}


class _Counter(TorchDispatchMode):
    """Adds up the operations of products and convolutions, inside custom operators too, which PyTorch's own counter skips."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim", "prims"):
            keys = torch._C.DispatchKey
            key = keys.CPU if func.has_kernel_for_dispatch_key(keys.CPU) else keys.CompositeExplicitAutograd
            with self:
                return func._op_dk(key, *args, **kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is _cpu_flash:
            self.flops += _cpu_flash(*args, **kwargs)
        elif formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def layer_flops(layer: Layer, tokens: int) -> int:
    """Floating-point operations of matrix products and convolutions in one forward pass; element-wise work is not counted."""
    mixer = build_layer(layer, tokens).eval()
    x, grid = random_input(layer, tokens)
    with torch.no_grad(), _Counter() as counter:
        mixer(x, grid=grid)
    return counter.flops


def state_bytes(layer: Layer, tokens: int) -> int | None:
    """Bytes of streaming state a sequence after so many tokens; None where the mixer does not stream."""
    if not can_stream(layer):
        return None
    mixer = build_layer(layer, tokens).eval()
    x, _ = random_input(layer, tokens)
    with torch.no_grad():
        _, state = mixer.extend(x[:1], mixer.init_state(1))
    return state.nbytes
