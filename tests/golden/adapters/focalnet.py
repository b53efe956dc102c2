"""Focal modulation."""

from __future__ import annotations

import re

from torch import Tensor

from attnlab import create_mixer, record
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:focal_modulation",)


def _flag(text: str, name: str) -> bool:
    return re.search(rf"{name}\s*=\s*True", text) is not None


def run(recording: Recording) -> dict[str, Tensor]:
    text, weights = recording.config["ctor"], recording.parameters()
    x = recording.leaf("in/x")
    b, height, width, dim = x.shape
    sides = [
        weights[f"focal_layers.{level}.0.weight"].shape[-1] for level in range(sum("focal_layers" in key for key in weights))
    ]
    mixer = create_mixer(
        "focal_modulation",
        dim,
        levels=len(sides),
        window=sides[0],
        factor=sides[1] - sides[0] if len(sides) > 1 else 2,
        normalize=_flag(text, "normalize_modulator"),
        post_norm="ln.weight" in weights,
    ).to(recording.dtype)
    names = {"f": "in_proj", "h": "modulate", "proj": "out_proj", "ln": "post_norm"}
    names |= {f"focal_layers.{level}.0.weight": f"kernels.{level}" for level in range(len(sides))}
    fill(mixer, renamed(weights, names))
    with record(mixer) as tape:
        y = mixer(x.flatten(1, 2), grid=(height, width)).view_as(x)
    (y * recording["in/w"]).sum().backward()
    results = {"out/y": y, "grad/x": x.grad}
    for name in ("modulator", "gates"):
        results[f"out/{name}"] = tape[name].transpose(1, 2).reshape(b, -1, height, width)
    return {key: value for key, value in results.items() if key in recording}
