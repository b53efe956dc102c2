"""Histoformer's attention, the block around it, and the Pearson loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnlab import Mixer, create_mixer
from attnlab.core.grid import from_grid, to_grid
from attnlab.objectives import create_objective
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:histogram", "objective:pearson")

NAMES = {"qkv": "in_proj", "qkv_dwconv": "conv", "project_out": "out_proj", "temperature": "temperature"}


def _mixer(recording: Recording, weights: dict[str, Tensor]) -> Mixer:
    config = recording.config
    mixer = create_mixer("histogram", config["dim"], config["num_heads"], bias=config["bias"]).to(recording.dtype)
    fill(mixer, renamed(weights, NAMES))
    return mixer


def _attention(mixer: Mixer, image: Tensor) -> Tensor:
    grid = tuple(image.shape[2:])
    return to_grid(mixer(from_grid(image), grid=grid), grid)


def _norm(image: Tensor) -> Tensor:
    """Over the channels; in this implementation it has no weights."""
    return F.layer_norm(image.movedim(1, -1), image.shape[1:2]).movedim(-1, 1)


def _feed_forward(weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """Two depthwise convolutions on twice the resolution, one of which gates the other."""
    y = F.pixel_shuffle(F.conv2d(image, weights["project_in.weight"], weights.get("project_in.bias")), 2)
    near, far = y.chunk(2, dim=1)
    options = {"groups": near.shape[1], "padding": 2}
    near = F.conv2d(near, weights["dwconv_5.weight"], weights.get("dwconv_5.bias"), **options)
    far = F.conv2d(far, weights["dwconv_dilated2_1.weight"], weights.get("dwconv_dilated2_1.bias"), dilation=2, **options)
    y = F.pixel_unshuffle(F.mish(far) * near, 2)
    return F.conv2d(y, weights["project_out.weight"], weights.get("project_out.bias"))


def run(recording: Recording) -> dict[str, Tensor]:
    if "in/output" in recording:
        output = recording.leaf("in/output")
        loss = create_objective("pearson")([output, recording["in/target"]])
        loss.backward()
        return {"out/loss": loss, "grad/output": output.grad}
    x = recording.leaf("in/x")
    if "cls" in recording.config:
        mixer = _mixer(recording, recording.parameters("attn_g."))
        y = x + _attention(mixer, _norm(x))
        y = y + _feed_forward(recording.parameters("ffn."), _norm(y))
    else:
        y = _attention(_mixer(recording, recording.parameters()), x)
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "grad/x": x.grad}
