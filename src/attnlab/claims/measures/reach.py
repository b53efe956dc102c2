"""How far a stack of mixers sees: the tokens on which each output depends, read off gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from attnlab.claims.cells import Cells
from attnlab.claims.quantity import Measured, over
from attnlab.core.catalog import create_mixer, mixer_info

NOTHING = 1e-12
"""Gradients below this share of the largest are rounding."""


def dependence(layers: Sequence[nn.Module], grid: Sequence[int], dim: int, seed: int) -> Bool[Tensor, "n n"]:
    """Which tokens (columns) the outputs (rows) of residual layers depend on, for one random input in float64."""
    generator = torch.Generator().manual_seed(seed)
    n = prod(grid)
    x = torch.randn(1, n, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(dim, generator=generator, dtype=torch.float64)
    y = x
    for layer in layers:
        y = y + (layer(y) if len(grid) == 1 else layer(y, grid=tuple(grid)))
    outputs = (y[0] @ cotangent).unbind()
    rows = [torch.autograd.grad(out, x, retain_graph=True)[0][0].norm(dim=-1) for out in outputs]
    sizes = torch.stack(rows)
    return sizes > NOTHING * sizes.max()


def build(stack: Sequence[Mapping[str, Any]], dim: int, num_heads: int, seed: int) -> list[nn.Module]:
    """The layers of a stack: for each a table with the mixer's "name" and its options."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return [_layer(dict(entry), dim, num_heads) for entry in stack]


def _layer(entry: dict[str, Any], dim: int, num_heads: int) -> nn.Module:
    name = entry.pop("name")
    known = {option.name for option in mixer_info(name).options}
    heads = {"num_heads": num_heads} if "num_heads" in known else {}
    made = create_mixer(name, dim, dtype=torch.float64, **heads, **entry)
    if not isinstance(made, nn.Module):
        raise TypeError(f"stacks: expected mixers that are modules, got {name!r}")
    return made.eval()


def receptive_fields(
    cells: Cells,
    *,
    grid: Sequence[int],
    dim: int,
    num_heads: int,
    stacks: Mapping[str, Sequence[Mapping[str, Any]]],
    draws: int,
    causal: bool = False,
) -> Measured:
    """Shares of the tokens that outputs of stacks of layers depend on; a layer is x + mixer(x), and nothing else.

    Quantities: for each stack, by its label, the share of the output that sees least, and "LABEL_mean" over outputs; where
    ``causal``, of the tokens up to its own. "LABEL_tokens", how many the output in the middle sees.

    Args:
        cells: keeps each draw.
        grid: sides of the input.
        dim: width.
        num_heads: heads of the mixers that have some.
        stacks: for each label the layers, first to last: "name" and options of a mixer.
        draws: random inputs and weights.
        causal: whether only earlier tokens can be seen.
    """

    def measure(stack: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
        seen = dependence(build(stack, dim, num_heads, seed), grid, dim, seed)
        n = len(seen)
        allowed = torch.arange(1, n + 1) if causal else torch.full((n,), n)
        shares = seen.sum(1) / allowed
        middle = 0
        for side in grid:
            middle = middle * side + side // 2
        return {"least": float(shares.min()), "mean": float(shares.mean()), "tokens": float(seen[middle].sum())}

    common = {"grid": list(grid), "dim": dim, "num_heads": num_heads, "causal": causal}
    quantities, details = {}, {}
    for label, stack in stacks.items():
        settings = {**common, "stack": [dict(entry) for entry in stack]}
        runs = [
            cells(f"reach of {label}, draw {seed}", settings, lambda stack=stack, seed=seed: measure(stack, seed))  # type: ignore[misc]
            for seed in range(draws)
        ]
        for what, suffix in (("least", ""), ("mean", "_mean"), ("tokens", "_tokens")):
            quantities[label + suffix] = over([run[what] for run in runs], unit="tokens" if what == "tokens" else "")
        details[label] = runs
    return Measured(quantities, details)
