"""gCOG's answers and tokens on recorded rules and grids, and its cross-attention model on a batch of them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import attnlab
from attnlab.tasks.gcog.rules import OPERATORS, Rule, Selector, encode_grid, encode_rule, evaluate
from golden.layers import layer_norm, linear
from golden.recording import Recording, fill, renamed, rows

PROVES = ("task:gcog",)
GIVEN = {"getcolor": (True, False), "getshape": (False, True)}
"""Which of shape and colour a getter is told."""


def _rule(recording: Recording, index: int, node: int = 0) -> Rule:
    """The rule whose statement stands at ``node``."""
    edges = recording[f"in/s{index}_edges"].tolist()
    operator = OPERATORS[int(recording[f"in/s{index}_ops"][node])]
    shape_told, colour_told = GIVEN.get(operator, (True, True))
    given = [
        Selector(shape if shape_told else 0, colour if colour_told else 0, (row, column))
        for shape, colour, row, column in recording[f"in/s{index}_selectors"][node].tolist()
        if shape or colour
    ]
    branches = [end for start, end in edges if start == node]
    if not branches:
        return Rule(operator, tuple(given))
    then, otherwise = (_rule(recording, index, end) for start, end in edges if start == branches[0])
    return Rule(operator, tuple(given), then, otherwise)


def _mixer(weights: dict[str, Tensor], name: str, heads: int, dim: int, dtype: torch.dtype) -> torch.nn.Module:
    mixer = attnlab.create_mixer("softmax", dim, heads, qkv_bias=True, dtype=dtype)
    packed = {key.replace("in_proj_", "in_proj."): value for key, value in weights.items()}
    cut = rows(packed, f"{name}.in_proj", dict.fromkeys(("q_proj", "k_proj", "v_proj"), dim))
    fill(mixer, cut | renamed(packed, {f"{name}.out_proj": "out_proj"}))
    return mixer


def _sinusoids(n: int, dim: int, dtype: torch.dtype) -> Tensor:
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(n, dtype=torch.float64)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1).to(dtype)


def _log_probs(recording: Recording) -> Tensor:
    weights, dtype, heads = recording.parameters(), recording.dtype, 2
    dim = weights["layernorm_crossattn.weight"].shape[0]
    streams = {"rule": recording["in/rule_batch"], "stim": recording["in/stim_batch"][..., 0]}
    latent = torch.zeros(len(streams["rule"]), 1, dim, dtype=dtype)
    for name, tokens in streams.items():
        own = recording.parameters(f"{name}_transformer.")
        x = linear(own, "w_embed", tokens.to(dtype))
        x = x + _sinusoids(x.shape[1], dim, dtype)
        x = layer_norm(own, "layernorm0", x + _mixer(own, "selfattention", heads, dim, dtype)(x))
        x = layer_norm(own, "layernorm1", x + F.relu(linear(own, "mlp.2", F.relu(linear(own, "mlp.0", x)))))
        read = _mixer(weights, f"{name}_crossattention", heads, dim, dtype)(latent, x)
        latent = layer_norm(weights, "layernorm_crossattn", latent + read)
    return linear(weights, "w_out.0", latent[:, 0]).log_softmax(-1)


def run(recording: Recording) -> dict[str, Tensor]:
    """Answers of all samples, whose tokens must be ours; the model's log-probabilities."""
    results = {}
    for index in range(int(recording["in/n"])):
        rule, tokens = _rule(recording, index), recording[f"in/s{index}_grid"].numpy()
        side = int((len(tokens) - 1) ** 0.5)
        grid = tokens[:-1, :2].reshape(side, side, 2).astype(np.int64)
        assert (encode_rule(rule) == recording[f"in/s{index}_rule"].numpy()).all()
        assert (encode_grid(grid) == tokens).all()
        results[f"out/s{index}_target"] = torch.tensor(evaluate(rule, grid))
    return results | {"out/log_probs": _log_probs(recording)}
