"""The promised cost: work is counted at two lengths, and its growth compared with the exponent."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from attnlab.checking.bench import Bench
from attnlab.checking.require import require
from attnlab.checking.suite import conformance
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid

ABOVE, BELOW = 0.15, 0.6
"""How far the measured exponent may exceed the declared one (a logarithm and lower terms fit in), and fall short of it."""

_ROUNDS = ((512, 1024), (1024, 2048))  # the second only if the first disagrees: lower terms weigh less there

_ATEN = torch.ops.aten
_FLOPS = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
}
_PLACES = {"index_put_", "index_copy_", "index_add_", "index_fill_", "scatter_", "scatter_add_", "scatter_reduce_"}


class WorkCounter(TorchDispatchMode):
    """Counts what runs inside the block, on the CPU, inside custom operators too.

    Attributes:
        work: floating-point operations of matrix products, convolutions and fused attention, plus the elements that every
            operation makes or changes. No time or memory that grows faster than the rest can hide from the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim", "prims"):
            with self:
                return _kernel(func)(*args, **kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        if (formula := _FLOPS.get(func._overloadpacket)) is not None:
            self.work += formula(*args, **kwargs, out_val=out)
        if not func.is_view:
            name = func._schema.name.partition("::")[2]
            self.work += _largest(args[1:]) if name in _PLACES else _sum(out)
        return out


def _kernel(func: Any) -> Any:
    """The function behind a custom operator, whose inside the counter sees."""
    keys = torch._C.DispatchKey
    key = keys.CPU if func.has_kernel_for_dispatch_key(keys.CPU) else keys.CompositeExplicitAutograd
    return lambda *args, **kwargs: func._op_dk(key, *args, **kwargs)


def _sizes(values: Any) -> list[int]:
    return [leaf.numel() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _sum(values: Any) -> int:
    return sum(_sizes(values))


def _largest(values: Any) -> int:
    return max(_sizes(values), default=0)


def _grid(rank: int, n: int) -> Grid:
    side = 2 ** (int(math.log2(n)) // rank)
    return (*[side] * (rank - 1), n // side ** (rank - 1))


def work(mixer: Mixer, rank: int, n: int, *, masked: bool) -> int:
    """What one forward pass of a float32 mixer over n tokens counts."""
    grid = _grid(rank, n)
    x = torch.randn(1, n + mixer.num_prefix, mixer.dim)
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if masked else None
    with torch.no_grad(), WorkCounter() as counter:
        mixer(x, mask=mask, grid=grid if rank > 1 else None)
    return counter.work


def exponent(sized: Callable[[int], Mixer], rank: int, lengths: tuple[int, int], *, masked: bool) -> float:
    """The slope of the logarithm of `work` between two lengths; ``sized`` gives the float32 mixer for each."""
    short, long = (work(sized(n), rank, n, masked=masked) for n in lengths)
    return math.log(long / short) / math.log(lengths[1] / lengths[0])


@conformance(law=7, promise="cost")
def cost_exponent(bench: Bench) -> str:
    """Operations and elements written grow with n as declared: no faster, and not much slower."""
    declared, rank = bench.supports.cost, min(bench.supports.grid)
    for lengths in _ROUNDS:
        found = {}
        for mixer in bench.mixers():

            def single(n: int, mixer: Mixer = mixer) -> Mixer:
                return copy.deepcopy(bench.sized(mixer, (n,))).to(torch.float32)

            for masked in {False, bench.supports.mask}:
                found[f"causal={mixer.causal}{', masked' if masked else ''}"] = exponent(single, rank, lengths, masked=masked)
        worst = max(found, key=lambda said: found[said])
        measured = f"measured {found[worst]:.2f} from n={lengths[0]} to {lengths[1]} ({worst})"
        if declared - BELOW <= found[worst] <= declared + ABOVE:
            return measured
    require(found[worst] <= declared + ABOVE, f"declared {declared:g}, {measured}")
    require(found[worst] >= declared - BELOW, f"declared {declared:g}, needlessly high: {measured}")
    return measured
