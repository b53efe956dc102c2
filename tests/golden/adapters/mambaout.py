"""The block of MambaOut: norm, gated convolution, residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:mambaout",)


def run(recording: Recording) -> dict[str, Tensor]:
    weights, config = recording.parameters(), recording.config
    x = recording.leaf("in/x")
    b, height, width, dim = x.shape
    hidden, convolved = weights["fc2.weight"].shape[1], weights["conv.weight"].shape[0]
    mixer = create_mixer(
        "mambaout",
        dim,
        expansion=(hidden + 0.5) / dim,
        conv_ratio=(convolved + 0.5) / dim,
        kernel_size=weights["conv.weight"].shape[-1],
        bias="fc1.bias" in weights,
        conv_bias="conv.bias" in weights,
        activation=config.get("act", "gelu"),
    ).to(recording.dtype)
    fill(mixer, renamed(weights, {"fc1": "in_proj", "conv": "conv", "fc2": "out_proj"}))
    z = F.layer_norm(x, (dim,), weights["norm.weight"], weights["norm.bias"], eps=1e-6)
    y = x + mixer(z.reshape(b, height * width, dim), grid=(height, width)).view_as(x)
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "grad/x": x.grad}
