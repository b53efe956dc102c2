"""InLine attention in two flavours: on Swin's windows, and DeiT's with a class token."""

from __future__ import annotations

import math

from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:inline",)

_KERNELS = {"leakyrelu": "leaky_relu"}
_NAMES = {"proj": "out_proj", "residual.0": "residual.hidden", "residual.2": "residual.predict"}


def _run(recording: Recording, flavour: str, config: dict) -> dict[str, Tensor]:
    dim, heads = config["dim"], config["num_heads"]
    weights = recording.parameters(f"{flavour}.")
    x = recording.leaf(f"in/{flavour}_x")
    prefix = int(flavour == "deit")
    if "window_size" in config:
        grid = tuple(config["window_size"])
    else:
        side = config.get("window") or math.isqrt(x.shape[1] - prefix)
        grid = (side, side)
    kernel = config.get("kernel_func") or "identity"
    mixer = create_mixer(
        "inline",
        dim,
        heads,
        kernel=_KERNELS.get(kernel, kernel),
        class_token=bool(prefix),
        qkv_bias="qkv.bias" in weights or "q.bias" in weights,
    ).to(recording.dtype)
    values = renamed(weights, _NAMES)
    if "qkv.weight" in weights:
        values |= rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim})
    else:
        values |= renamed(weights, {"q": "q_proj"}) | rows(weights, "kv", {"k_proj": dim, "v_proj": dim})
    fill(mixer, values)
    y = mixer(x, grid=grid)
    (y * recording[f"in/{flavour}_w"]).sum().backward()
    return {f"out/{flavour}": y, f"grad/{flavour}_x": x.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for flavour, config in recording.config.items():
        results |= _run(recording, flavour, config)
    return results
