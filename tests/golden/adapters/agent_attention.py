"""Agent attention in its three flavours: windows of Swin, DeiT with a class token, PVT with reduced keys."""

from __future__ import annotations

import math

from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:agent",)

_PLACES = {
    "an_bias": ("key_bias", "block"),
    "ah_bias": ("key_bias", "rows"),
    "aw_bias": ("key_bias", "columns"),
    "ac_bias": ("key_bias", "prefix"),
    "na_bias": ("query_bias", "block"),
    "ha_bias": ("query_bias", "rows"),
    "wa_bias": ("query_bias", "columns"),
    "ca_bias": ("query_bias", "prefix"),
}


def _biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    # ours: (heads, agents, rows, columns) for both steps; theirs keep the agents last in the second step's row and column parts
    found = {}
    for name, (module, part) in _PLACES.items():
        if name in weights:
            value = weights[name]
            if name in ("ha_bias", "wa_bias", "ca_bias"):
                value = value.movedim(-1, 2)
            found[f"{module}.{part}"] = value
    return found


def _run(recording: Recording, flavour: str, config: dict) -> dict[str, Tensor]:
    dim, heads = config["dim"], config["num_heads"]
    weights = recording.parameters(f"{flavour}.")
    x, cotangent = recording.leaf(f"in/{flavour}_x"), recording[f"in/{flavour}_w"]
    prefix = int(flavour == "deit")
    if "window_size" in config:
        grid = tuple(config["window_size"])
    else:
        side = config.get("window") or math.isqrt(x.shape[1] - prefix)
        grid = (side, side)
    mixer = create_mixer(
        "agent",
        dim,
        heads,
        num_agents=config["agent_num"],
        bias_grid=grid,
        class_token=bool(prefix),
        reduction=config.get("sr_ratio", 1),
        qkv_bias="qkv.bias" in weights or "q.bias" in weights,
    ).to(recording.dtype)
    mapped = _biases(weights) | renamed(weights, {"proj": "out_proj", "dwc": "dwc", "sr": "shrink", "norm": "shrink_norm"})
    if "qkv.weight" in weights:
        mapped |= rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim})
    else:
        mapped |= renamed(weights, {"q": "q_proj"}) | rows(weights, "kv", {"k_proj": dim, "v_proj": dim})
    fill(mixer, mapped)
    y = mixer(x, grid=grid)
    (y * cotangent).sum().backward()
    return {f"out/{flavour}": y, f"grad/{flavour}_x": x.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for flavour, config in recording.config.items():
        results |= _run(recording, flavour, config)
    return results
