"""The promise of a mixing matrix: it is what multiplies the values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.checking.bench import Bench, Inputs, Trial, gradients_of
from attnlab.checking.draw import MASKS
from attnlab.checking.outcome import Violation
from attnlab.checking.require import FORWARD, require, require_close, require_gradients, require_zero
from attnlab.checking.suite import conformance
from attnlab.core.contract import Mixer
from attnlab.core.masks import causal_pairs
from attnlab.core.record import record


def recorded(mixer: Mixer, inputs: Inputs) -> tuple[Float[Tensor, "b h m e"], Float[Tensor, "b h n e"]]:
    """``values`` and ``mixed`` that a forward pass emits; `Violation` where it does not."""
    with record(mixer, only=("values", "mixed")) as tape:
        inputs.apply(mixer)
    for name in ("values", "mixed"):
        if name not in tape:
            raise Violation(f"promises a mixing matrix, but a forward pass emits no {name!r} to attnlab.record")
    return tape["values"], tape["mixed"]


def _arguments(bench: Bench, trial: Trial) -> Iterator[tuple[str, Inputs, Bool[Tensor, "#b #h n m"]]]:
    """Inputs with every argument that the mixer takes, and the pairs that they allow."""
    inputs, supports = trial.inputs, bench.supports
    batch, n = inputs.x.shape[:2]
    past = causal_pairs(n, n) if trial.causal else torch.ones(n, n, dtype=torch.bool)
    yield "plain", inputs, past[None, None]
    if supports.mask:
        for kind in MASKS:
            mask = bench.draw.mask(kind, batch, n)
            pairs = past & mask[:, None, None, :] & mask[:, None, :, None]
            yield f"masked on the {kind}", replace(inputs, mask=mask), pairs
    if supports.pair_mask:
        pairs = bench.draw.pair_mask(batch, trial.mixer.num_heads, n, n)
        yield "pair_mask", replace(inputs, pair_mask=pairs), past & pairs
    if supports.cross and not trial.causal:
        context = bench.context_for(trial)
        yield "context", replace(inputs, context=context), torch.ones(1, 1, n, context.shape[1], dtype=torch.bool)


@conformance(law=0, promise="mixing_matrix")
def mixing_matrix(bench: Bench) -> str:
    """The matrix is (b, h, n, m), is 0 at pairs that are not allowed, and times the recorded values is what was mixed."""
    for trial in bench.trials():
        for said, inputs, allowed in _arguments(bench, trial):
            said = f"{trial}, {said}"
            with torch.no_grad():
                matrix = inputs.matrix(trial.mixer)
                values, mixed = recorded(trial.mixer, inputs)
            expected = (*values.shape[:2], inputs.x.shape[1], values.shape[2])
            require(tuple(matrix.shape) == expected, f"{said}: expected a matrix {expected}, got {tuple(matrix.shape)}")
            require_zero(f"{said}: the matrix at pairs that are not allowed", matrix[~allowed.expand_as(matrix)])
            product = matrix @ values
            if inputs.mask is not None:
                real = inputs.mask[:, None, :, None]
                product, mixed = product.masked_fill(~real, 0.0), mixed.masked_fill(~real, 0.0)
            require_close(f"{said}: matrix @ values against what was mixed", product, mixed, FORWARD)
    return bench.said()


@conformance(law=0, promise="mixing_matrix")
def mixing_matrix_gradient(bench: Bench) -> str:
    """Gradients flow through the matrix: those of matrix @ values are those of what was mixed."""
    for trial in bench.trials():
        x = trial.inputs.x.clone().requires_grad_()
        inputs = replace(trial.inputs, x=x)
        values, mixed = recorded(trial.mixer, inputs)
        product = inputs.matrix(trial.mixer) @ values
        direction = bench.draw.normal(*mixed.shape)
        leaves = {"x": x, **dict(trial.mixer.named_parameters())}
        got, expected = (gradients_of((y * direction).sum(), leaves) for y in (product, mixed))
        require_gradients(f"{trial}, through the matrix", got, expected)
    return bench.said()
