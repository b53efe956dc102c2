"""Rank-augmented linear attention, and softmax attention with the same parameters, as in the authors' last stages."""

from __future__ import annotations

from torch import Tensor

from attnlab.core.grid import from_grid, to_grid
from golden.gated_grid import mixer_of, softmax_with
from golden.recording import Recording

PROVES = ("mixer:rala",)


def run(recording: Recording, name: str = "rala") -> dict[str, Tensor]:
    config = recording.config
    grid = (config["H"], config["W"])
    mixer = mixer_of(name, recording.parameters(), config)
    image = recording.leaf("in/x")
    x = from_grid(image)
    y = to_grid(mixer(x, grid=grid), grid)
    (y * recording["in/w"]).sum().backward()
    results = {"out/y": y, "grad/x": image.grad}
    if "out/vanilla_softmax_same_params" in recording:
        results["out/vanilla_softmax_same_params"] = to_grid(softmax_with(mixer, x.detach(), grid), grid)
    return results
