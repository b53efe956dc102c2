"""The gated linear attention layer of TransNormerLLM."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:transnormer",)


def run(recording: Recording) -> dict[str, Tensor]:
    config, weights = recording.config, recording.parameters()
    mixer = create_mixer(
        "transnormer",
        config["D"],
        config["heads"],
        layer=config["layer"],
        num_layers=config["num_layers"],
        lrpe=config["lrpe"],
    ).to(recording.dtype)
    slopes = recording["in/slopes"].reshape(-1)
    torch.testing.assert_close(-mixer.log_decay, slopes, rtol=1e-4, atol=1e-9)
    mixer.log_decay = -slopes
    fill(mixer, renamed(weights, {"qkvu_proj": "in_proj", "out_proj": "out_proj", "theta": "lrpe.theta"}))
    x = recording.leaf("in/x")
    y = mixer(x)
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "grad/x": x.grad}
