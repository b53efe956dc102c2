"""Token-aware average pooling, and the attention diversification loss on two layers' maps."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from attnlab import create_mixer, record
from attnlab.core.grid import from_grid, to_grid
from attnlab.objectives import create_objective
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:token_pooling", "objective:attention_diversity")

_NAMES = {"proj.0": "score.conv", "proj.1": "score.norm", "proj.2": "choose"}


def run(recording: Recording) -> dict[str, Tensor]:
    image = recording.leaf("in/x")
    dim, grid = image.shape[1], tuple(image.shape[2:])
    weights = recording.parameters("dilation_predictor.")
    # What is recorded ends at the pooled map, so the mixer behind it makes no difference; this one has no parameters.
    mixer = create_mixer("token_pooling", dim, 1, mixer="pooling", scales=weights["proj.2.weight"].shape[0])
    fill(mixer.to(recording.dtype).eval(), renamed(weights, _NAMES))
    with record(mixer, only=["pooled", "scales"]) as tape:
        mixer(from_grid(image), grid=grid)
    pooled = to_grid(tape["pooled"], grid)
    (pooled * recording["in/w"]).sum().backward()
    threshold = float(re.search(r"th\s*=\s*([\d.]+)", recording.config["ctor"]).group(1))
    maps = [recording[key] for key in sorted(recording.tensors) if re.fullmatch(r"in/a\d+", key)]
    with torch.no_grad():
        loss = create_objective("attention_diversity", threshold=threshold)(maps)
    shares = tape["scales"].unflatten(1, grid).unsqueeze(1)
    return {"out/tap": pooled, "out/scale_weights": shares, "out/adl": loss, "grad/x": image.grad}
