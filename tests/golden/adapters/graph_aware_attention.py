"""Graph isomorphic attention."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill

PROVES = ("mixer:graph_isomorphic",)

_PREFIX = "attention_GIN_MLP_"


def _options(config: dict) -> dict:
    """Our options for an official configuration; a key that is not known here is not passed over."""
    given = dict(config)
    options = {
        "score": "mlp" if given.pop(f"{_PREFIX}use_scoring_fnct", True) else "dot",
        "normalizer": "softmax" if given.pop(f"{_PREFIX}GIN_use_softmax", False) else "identity",
        "adjacency": given.pop(f"{_PREFIX}GIN_threshold_mode", "none"),
        "threshold": float(given.pop(f"{_PREFIX}GIN_threshold_value", 0.2)),
    }
    start = float(given.pop("initial_sharpening_value", 1.0))
    if given.pop("use_sharpening", False):
        options["sharpening"] = start
    if given:
        raise ValueError(f"gnn_config: no counterpart is known for {sorted(given)}")
    return options


def _weights(weights: dict[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    def stacked(name: str, *, layer: bool = False) -> Tensor:
        each = [weights[f"gin_layers.{h}.{name}"] for h in range(heads)]
        return torch.stack([one.T for one in each] if layer else each)

    key = weights["k_proj.weight"]
    grouped = key.view(kv_heads, -1, key.shape[1]).repeat_interleave(heads // kv_heads, dim=0)  # a key head serves several
    mapped = {
        "q_proj.weight": weights["q_proj.weight"],
        "k_proj.weight": grouped.flatten(0, 1),
        "out_proj.weight": weights["o_proj.weight"],
        "epsilon": stacked("epsilon"),
        "mlp.up": stacked("mlp.0.weight", layer=True),
        "mlp.up_bias": stacked("mlp.0.bias"),
        "mlp.norm": stacked("mlp.2.weight"),
        "mlp.down": stacked("mlp.4.weight", layer=True),
        "mlp.down_bias": stacked("mlp.4.bias"),
    }
    if "sharpening_parameters.0" in weights:
        mapped["sharpening"] = weights["sharpening_parameters.0"]
    return mapped


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    dim, heads, weights = config["dim"], config["heads"], recording.parameters(f"{name}.")
    mixer = create_mixer(
        "graph_isomorphic",
        dim,
        heads,
        causal=True,
        out_bias=False,
        position="rotary",
        expansion=weights["gin_layers.0.mlp.0.bias"].shape[0] * heads // dim,
        **_options(config["gnn_config"]),
    ).to(recording.dtype)
    fill(mixer, _weights(weights, heads, config["kv_heads"]))
    x = recording.leaf(f"in/{name}.x")
    y = mixer(x)
    (y * recording[f"in/{name}.w"]).sum().backward()
    return {f"out/{name}.y": y, f"grad/{name}.x": x.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
