"""The promised cost: work is counted at two lengths, on the meta device, and its growth compared with the exponent."""

from __future__ import annotations

import copy
import math
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


class WorkCounter(TorchDispatchMode):
    """Counts what runs inside the block.

    Attributes:
        work: floating-point operations of matrix products and convolutions, plus elements written by every operation that
            makes or changes a tensor. No quadratic time or memory can hide from the sum of the two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.work += formula(*args, **kwargs, out_val=out)
        if func._schema.is_mutable:
            self.work += _changed(args)
        elif not func.is_view:
            self.work += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def _changed(args: Any) -> int:
    """Elements that an operation in place touches: those of the largest other tensor, as one row is put into a large one."""
    sizes = [leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    return max(sizes[1:], default=sizes[0] if sizes else 0)


def _grid(rank: int, n: int) -> Grid:
    side = 2 ** (int(math.log2(n)) // rank)
    return (*[side] * (rank - 1), n // side ** (rank - 1))


def work(mixer: Mixer, rank: int, n: int, *, masked: bool) -> int:
    """What one forward pass over n tokens counts, on the meta device."""
    grid = _grid(rank, n)
    x = torch.empty(1, n + mixer.num_prefix, mixer.dim, device="meta")
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device="meta") if masked else None
    with torch.no_grad(), WorkCounter() as counter:
        mixer(x, mask=mask, grid=grid if rank > 1 else None)
    return counter.work


def exponent(mixer: Mixer, rank: int, lengths: tuple[int, int], *, masked: bool) -> float:
    """The slope of the logarithm of `work` between two lengths."""
    short, long = (work(mixer, rank, n, masked=masked) for n in lengths)
    return math.log(long / short) / math.log(lengths[1] / lengths[0])


@conformance(law=7, promise="cost")
def cost_exponent(bench: Bench) -> str:
    """Operations and elements written grow with n as declared: no faster, and not much slower."""
    declared, rank = bench.supports.cost, min(bench.supports.grid)
    for lengths in _ROUNDS:
        found = {}
        for mixer in bench.mixers():
            on_meta = copy.deepcopy(mixer).to(device="meta", dtype=torch.float32)
            for masked in {False, bench.supports.mask}:
                found[f"causal={mixer.causal}{', masked' if masked else ''}"] = exponent(on_meta, rank, lengths, masked=masked)
        worst = max(found, key=lambda said: found[said])
        measured = f"measured {found[worst]:.2f} from n={lengths[0]} to {lengths[1]} ({worst})"
        if declared - BELOW <= found[worst] <= declared + ABOVE:
            return measured
    require(found[worst] <= declared + ABOVE, f"declared {declared:g}, {measured}")
    require(found[worst] >= declared - BELOW, f"declared {declared:g}, needlessly high: {measured}")
    return measured
