"""VOLO's outlook attention."""

from __future__ import annotations

import re

from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:outlook",)
LATER = {"backbone"}  # a whole network; named models are not here yet


def run(recording: Recording) -> dict[str, Tensor]:
    text, weights = recording.config["ctor"], recording.parameters()
    options = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}
    dim, window = weights["v.weight"].shape[1], options.get("kernel_size", 3)
    heads = options.get("num_heads", weights["attn.weight"].shape[0] // window**4)
    mixer = create_mixer("outlook", dim, heads, window=window, stride=options.get("stride", 1), v_bias="v.bias" in weights)
    mixer = mixer.to(recording.dtype)
    fill(mixer, renamed(weights, {"v": "v_proj", "attn": "weight_proj", "proj": "out_proj"}))
    x = recording.leaf("in/x")
    y = mixer(x.flatten(1, 2), grid=tuple(x.shape[1:3])).view(x.shape)
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "grad/x": x.grad}
