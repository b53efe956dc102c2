"""The promises about who reads whom: a context, and a choice of keys for each query."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnlab.checking.bench import Bench, measure
from attnlab.checking.causality import LEAK, sensitivity
from attnlab.checking.require import FORWARD, require, require_close, require_same
from attnlab.checking.suite import conformance


@conformance(law=0, promise="cross")
def cross(bench: Bench) -> str:
    """A context of another length is read: the output has the shape of x, and all of the context can move it."""
    for trial in bench.trials(causal=False):
        x, context = trial.inputs.x, bench.context_for(trial)
        got = measure(trial.mixer, replace(trial.inputs, context=context))
        require(got.output.shape == x.shape, f"{trial}: expected the shape of x, got {tuple(got.output.shape)}")
        reached = got.gradients["context"].abs().amax(dim=(0, 2))
        require(float(reached.max()) > 0.0, f"{trial}: the output does not depend on the context")
    return bench.said()


@conformance(law=0, promise="cross", when=lambda supports: supports.cross and supports.permutation_equivariant)
def cross_with_itself(bench: Bench) -> str:
    """``context=x`` is what no context means, where no position tells a sequence from itself."""
    for trial in bench.trials(causal=False):
        if trial.mixer.context_dim != trial.mixer.dim:
            continue
        with torch.no_grad():
            alone = trial.inputs.apply(trial.mixer)
            itself = replace(trial.inputs, context=trial.inputs.x.clone()).apply(trial.mixer)
        require_close(f"{trial}: context=x", itself, alone, FORWARD)
    return bench.said()


@conformance(law=0, promise="pair_mask")
def pair_mask(bench: Bench) -> str:
    """A query does not depend on keys that its row leaves out, and does on some that it keeps."""
    for trial in bench.trials():
        n = trial.inputs.x.shape[1]
        pairs = bench.draw.pair_mask(1, 1, n, n)
        for t in sorted({n - 1, bench.draw.integer(0, n - 1)}):
            moved = sensitivity(trial.mixer, replace(trial.inputs, pair_mask=pairs), t)
            others = torch.arange(n) != t  # a token moves its own output through the query, whatever its row says
            left_out = moved[:, ~pairs[0, 0, t] & others]
            leak = float(left_out.max()) if left_out.numel() else 0.0
            require(leak <= LEAK * float(moved.max()), f"{trial}: output {t} depends on a key left out (gradient {leak:.3g})")
    return bench.said()


@conformance(law=0, promise="pair_mask")
def pair_mask_broadcast(bench: Bench) -> str:
    """One pair_mask for all, or repeated for each example and head, is the same; one of ones changes nothing."""
    for trial in bench.trials():
        batch, n = trial.inputs.x.shape[:2]
        for one in (bench.draw.pair_mask(1, 1, n, n), torch.ones(1, 1, n, n, dtype=torch.bool)):
            many = one.expand(batch, trial.mixer.num_heads, -1, -1).contiguous()
            broadcast = measure(trial.mixer, replace(trial.inputs, pair_mask=one))
            require_same(f"{trial}: repeated", measure(trial.mixer, replace(trial.inputs, pair_mask=many)), broadcast)
        require_same(f"{trial}: pair_mask of ones", broadcast, measure(trial.mixer, trial.inputs))
    return bench.said()


@conformance(law=0, promise="pair_mask", when=lambda supports: supports.pair_mask and supports.mask)
def pair_mask_equals_mask(bench: Bench) -> str:
    """Leaving a key out of every row is masking its token, at the other tokens."""
    for trial in bench.trials():
        batch, n = trial.inputs.x.shape[:2]
        mask = bench.draw.mask("inside", batch, n)
        pairs = mask[:, None, None, :].expand(-1, 1, n, -1)
        with torch.no_grad():
            masked = replace(trial.inputs, mask=mask).apply(trial.mixer)
            paired = replace(trial.inputs, pair_mask=pairs).apply(trial.mixer)
        require_close(f"{trial}: pair_mask against mask", paired[mask], masked[mask], FORWARD)
    return bench.said()
