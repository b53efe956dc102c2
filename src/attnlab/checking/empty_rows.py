"""Law 2: a query with no key to use gives exactly 0 and a zero gradient, never NaN."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from attnlab.checking.bench import Bench, Inputs, Trial
from attnlab.checking.require import require_finite, require_zero
from attnlab.checking.suite import conformance

_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
)  # tricks with "very negative" numbers work in one dtype and not in another


@conformance(law=2, promise="mask")
def empty_rows(bench: Bench) -> str:
    """An example without a real token, and masked tokens before the first real one, give exactly 0 and a zero gradient."""
    for trial in bench.trials():
        batch, n = trial.inputs.x.shape[:2]
        mask = torch.arange(n).expand(batch, -1) >= bench.draw.integer(1, n)
        mask[0] = False
        _demand(trial, replace(trial.inputs, mask=mask), ~mask)
    return bench.said()


@conformance(law=2, promise="pair_mask")
def empty_rows_pair_mask(bench: Bench) -> str:
    """A query whose row of pair_mask is all False gives exactly 0 and a zero gradient."""
    for trial in bench.trials():
        batch, n = trial.inputs.x.shape[:2]
        pairs = bench.draw.pair_mask(batch, 1, n, n)
        pairs[:, :, bench.draw.integer(1, n - 1)] = False
        pairs[:, :, 0, 0] = False  # under causality the first query has no other key
        usable = pairs.tril() if trial.causal else pairs
        _demand(trial, replace(trial.inputs, pair_mask=pairs), ~usable[:, 0].any(dim=-1))
    return bench.said()


@conformance(law=2, promise="cross", when=lambda supports: supports.cross and supports.mask)
def empty_rows_context(bench: Bench) -> str:
    """Queries of an example whose context is masked throughout give exactly 0 and a zero gradient."""
    for trial in bench.trials(causal=False):
        batch, n = trial.inputs.x.shape[:2]
        context = bench.context_for(trial)
        real = torch.ones(context.shape[:2], dtype=torch.bool)
        real[0] = False
        empty = torch.zeros(batch, n, dtype=torch.bool)
        empty[0] = True
        _demand(trial, replace(trial.inputs, context=context, context_mask=real), empty)
    return bench.said()


def _demand(trial: Trial, inputs: Inputs, empty: Bool[Tensor, "b n"]) -> None:
    for dtype in _DTYPES:
        mixer = trial.mixer if dtype == torch.float64 else copy.deepcopy(trial.mixer).to(dtype)
        cast = inputs.map_tokens(lambda tokens, dtype=dtype: tokens.to(dtype).requires_grad_())
        leaves = [tokens for tokens in (cast.x, cast.context, *mixer.parameters()) if tokens is not None]
        output = cast.apply(mixer)
        said = f"{trial}, {dtype}"
        require_zero(f"{said}: the output of queries without a key", output[empty])
        require_finite(f"{said}: the output", output)
        for part, where in (("queries without a key", empty), ("all queries", torch.ones_like(empty))):
            gradients = torch.autograd.grad(output[where].sum(), leaves, retain_graph=True, materialize_grads=True)
            for gradient in gradients:
                require_finite(f"{said}: a gradient of {part}", gradient)
                if where is empty:
                    require_zero(f"{said}: the gradient of {part}", gradient)
