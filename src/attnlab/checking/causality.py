"""Law 3: with ``causal=True`` output t depends on inputs 0..t alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.checking.bench import Bench, Inputs
from attnlab.checking.outcome import NotApplicable
from attnlab.checking.require import FORWARD, ROUNDING, require, require_close
from attnlab.checking.suite import conformance
from attnlab.core.contract import Mixer

LEAK = 32 * torch.finfo(torch.float64).eps
"""Largest gradient from the future, relative to that from the past. It is 0 but for mechanisms that go through a Fourier
transform, whose rounding errors reach every token; a leak that matters is twelve orders of magnitude above."""


def sensitivity(mixer: Mixer, inputs: Inputs, t: int) -> Float[Tensor, "b n"]:
    """How much each input moves output t: the largest element of the gradient of a random projection of it."""
    x = inputs.x.detach().clone().requires_grad_()
    row = replace(inputs, x=x).apply(mixer)[:, t]
    direction = torch.randn(row.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((row * direction.to(row.dtype)).sum(), x, materialize_grads=True)
    return gradient.abs().amax(dim=-1)


@conformance(law=3, promise="causal")
def causality_gradient(bench: Bench) -> str:
    """The gradient of output t with respect to later inputs is 0, in evaluation and in training mode, with and without a mask."""
    for trial in bench.trials(causal=True):
        batch, n = trial.inputs.x.shape[:2]
        times = sorted({0, n // 2, n - 2, bench.draw.integer(0, n - 2)})
        masks = [None, bench.draw.mask("inside", batch, n)] if bench.supports.mask else [None]
        for train in (False, True):
            mixer = copy.deepcopy(trial.mixer).train() if train else trial.mixer
            for mask in masks:
                inputs = replace(trial.inputs, mask=mask)
                for t in times:
                    moved = sensitivity(mixer, inputs, t)
                    leak = float(moved[:, t + 1 :].max())
                    said = f"{trial}, {'training' if train else 'evaluation'}, {'no mask' if mask is None else 'mask'}"
                    where = t + 1 + int(moved[:, t + 1 :].amax(dim=0).argmax())
                    require(
                        leak <= LEAK * float(moved.max()),
                        f"{said}: output {t} depends on input {where} (gradient {leak:.3g}, from the past up to "
                        f"{float(moved[:, : t + 1].max()):.3g})",
                    )
    return bench.said()


@conformance(law=3, promise="causal")
def causality_perturbation(bench: Bench) -> str:
    """Other inputs after t, however large, do not change outputs up to t."""
    for trial in bench.trials(causal=True):
        n = trial.inputs.x.shape[1]
        t = bench.draw.integer(0, n - 2)
        x = trial.inputs.x.clone()
        x[:, t + 1 :] = 100.0 * bench.draw.normal(*x[:, t + 1 :].shape)
        with torch.no_grad():
            expected = trial.inputs.apply(trial.mixer)[:, : t + 1]
            got = replace(trial.inputs, x=x).apply(trial.mixer)[:, : t + 1]
        require_close(f"{trial}: outputs up to {t} when later inputs change", got, expected, 100.0 * ROUNDING)
    return bench.said()


@conformance(law=3, promise="causal", when=lambda supports: supports.causal != "no" and 1 in supports.grid)
def causality_truncation(bench: Bench) -> str:
    """A sequence that is cut after t has the same outputs up to t: the length is no part of the past."""
    for trial in bench.trials(causal=True, ranks=(1,)):
        if trial.mixer.fixed_tokens is not None:
            raise NotApplicable(f"it takes {trial.mixer.fixed_tokens} tokens, no fewer")
        n = trial.inputs.x.shape[1]
        with torch.no_grad():
            whole = trial.inputs.apply(trial.mixer)
            for t in sorted({trial.mixer.num_prefix, n // 2, n - 2, bench.draw.integer(trial.mixer.num_prefix, n - 2)}):
                cut = replace(trial.inputs, x=trial.inputs.x[:, : t + 1]).apply(trial.mixer)
                require_close(f"{trial}, cut after {t}", cut, whole[:, : t + 1], FORWARD)
    return bench.said()
