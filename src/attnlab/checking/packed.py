"""Packed sequences: one behind the other is the same as each alone."""

from __future__ import annotations

import torch

from attnlab.checking.bench import Bench
from attnlab.checking.require import BACKWARD, FORWARD, require_close
from attnlab.checking.suite import conformance

_LENGTHS = ([1], [5, 3], [1, 7, 2, 4])


@conformance(law=5, promise="varlen")
def packed_sequences(bench: Bench) -> str:
    """Each of several packed sequences has the output that it has alone, and so have the gradients."""
    for mixer in bench.mixers():
        for lengths in _LENGTHS:
            x = bench.draw.normal(sum(lengths), mixer.dim).requires_grad_()
            ends = torch.tensor(lengths).cumsum(0)
            packed = mixer.packed(x, torch.cat((torch.zeros(1, dtype=torch.int64), ends)))
            alone = torch.cat([mixer(part[None])[0] for part in x.split(lengths)])
            said = f"causal={mixer.causal}, packed lengths {lengths}"
            require_close(said, packed, alone, FORWARD)
            weights = bench.draw.normal(*packed.shape)
            ours, theirs = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (packed, alone))
            require_close(f"{said}, gradient", ours, theirs, BACKWARD)
            bench.looked_at += 1
    return bench.said()
