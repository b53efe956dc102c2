"""Law 1: what stands at masked tokens changes nothing."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from attnlab.checking.bench import Bench, Trial, measure
from attnlab.checking.draw import MASKS
from attnlab.checking.outcome import NotApplicable
from attnlab.checking.require import FORWARD, ROUNDING, require_close, require_same, require_zero
from attnlab.checking.suite import conformance

POISONS = {"NaN": float("nan"), "1e6": 1e6, "-inf": float("-inf")}
"""What is written to masked tokens."""


@conformance(law=1, promise="mask")
def padding_right(bench: Bench) -> str:
    """What stands at masked tokens on the right changes no output and no gradient; the output there is exactly 0."""
    return _perturb_masked(bench, "right")


@conformance(law=1, promise="mask")
def padding_left(bench: Bench) -> str:
    """What stands at masked tokens on the left changes no output and no gradient; the output there is exactly 0."""
    return _perturb_masked(bench, "left")


@conformance(law=1, promise="mask")
def padding_inside(bench: Bench) -> str:
    """What stands at masked tokens between real ones changes no output and no gradient; the output there is exactly 0."""
    return _perturb_masked(bench, "inside")


def _perturb_masked(bench: Bench, kind: str) -> str:
    for trial in bench.trials():
        mask = bench.draw.mask(kind, *trial.inputs.x.shape[:2])
        for train in (False, True):
            _perturb(trial, mask, f"{trial}, masked on the {kind}, {'training' if train else 'evaluation'}", train)
    return bench.said()


def _perturb(trial: Trial, mask: Bool[Tensor, "b n"], said: str, train: bool) -> None:
    inputs = replace(trial.inputs, mask=mask)
    expected = measure(trial.mixer, inputs, train=train)
    require_zero(f"{said}: the output at masked tokens", expected.output[~mask])
    require_zero(f"{said}: the gradient of x at masked tokens", expected.gradients["x"][~mask])
    for poison, value in POISONS.items():
        poisoned = replace(inputs, x=inputs.x.masked_fill(~mask.unsqueeze(-1), value))
        got = measure(trial.mixer, poisoned, train=train)
        require_same(f"{said}, {poison} there", got, expected, ROUNDING, ROUNDING)


@conformance(law=1, promise="mask", when=lambda supports: supports.mask and supports.cross)
def padding_context(bench: Bench) -> str:
    """What stands at masked tokens of the context changes no output and no gradient."""
    for trial in bench.trials(causal=False):
        context = bench.context_for(trial)
        for kind in MASKS:
            mask = bench.draw.mask(kind, *context.shape[:2])
            inputs = replace(trial.inputs, context=context, context_mask=mask)
            expected = measure(trial.mixer, inputs)
            said = f"{trial}, context masked on the {kind}"
            require_zero(f"{said}: the gradient of context at masked tokens", expected.gradients["context"][~mask])
            for poison, value in POISONS.items():
                poisoned = replace(inputs, context=context.masked_fill(~mask.unsqueeze(-1), value))
                require_same(f"{said}, {poison} there", measure(trial.mixer, poisoned), expected, ROUNDING, ROUNDING)
    return bench.said()


@conformance(law=1, promise="mask", when=lambda supports: supports.mask and 1 in supports.grid)
def padding_right_equals_shorter(bench: Bench) -> str:
    """A sequence that is padded on the right has the outputs of the sequence alone."""
    for trial in bench.trials(ranks=(1,)):
        if trial.mixer.fixed_tokens is not None:
            raise NotApplicable(f"it takes {trial.mixer.fixed_tokens} tokens, no more")
        x = trial.inputs.x
        batch, n, width = x.shape
        more = bench.draw.integer(1, 5)
        padded = torch.cat([x, bench.draw.normal(batch, more, width)], dim=1)
        mask = (torch.arange(n + more) < n).expand(batch, -1)
        with torch.no_grad():
            alone = trial.inputs.apply(trial.mixer)
            together = replace(trial.inputs, x=padded, mask=mask).apply(trial.mixer)
        require_close(f"{trial}, with {more} masked tokens more on the right", together[:, :n], alone, FORWARD)
    return bench.said()


@conformance(law=1, promise="mask")
def padding_mask_of_ones(bench: Bench) -> str:
    """A mask that is True everywhere changes nothing."""
    for trial in bench.trials():
        ones = torch.ones(trial.inputs.x.shape[:2], dtype=torch.bool)
        plain = measure(trial.mixer, trial.inputs)
        require_same(f"{trial}, mask of ones", measure(trial.mixer, replace(trial.inputs, mask=ones)), plain)
    return bench.said()
