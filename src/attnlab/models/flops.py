"""Floating-point operations of matrix products and convolutions, counted as they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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


def count_flops(run: Callable[[], object]) -> int:
    """Operations of the products and convolutions in ``run``, without gradients; element-wise work is not counted."""
    with torch.no_grad(), _Counter() as counter:
        run()
    return counter.flops
