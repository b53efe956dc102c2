"""TransNeXt: aggregated attention, and the convolutional gated linear unit."""

from __future__ import annotations

import re

from torch import Tensor

from attnlab import create_mixer
from attnlab.channel_mixers import create_channel_mixer
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:aggregated", "channel_mixer:conv_glu")
LATER = {"backbone"}  # a whole network; named models are not here yet


def _config(recording: Recording) -> dict[str, int]:
    """The numbers in the constructor's text: sizes by place, options by name."""
    text = recording.config["ctor"]
    sizes = re.match(r"AggregatedAttention\(\s*(\d+)\s*,\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)", text).groups()
    options = dict(re.findall(r"(\w+)=(\d+)", text))
    return {name: int(value) for name, value in (*zip(("dim", "height", "width"), sizes, strict=True), *options.items())}


def _attention(recording: Recording, config: dict[str, int], x: Tensor) -> Tensor:
    dim, weights = config["dim"], recording.parameters("attn.")
    mixer = create_mixer(
        "aggregated",
        dim,
        config["num_heads"],
        window=config["window_size"],
        reduction=config["sr_ratio"],
        qkv_bias="q.bias" in weights,
    ).to(recording.dtype)
    mapped = rows(weights, "kv", {"k_proj": dim, "v_proj": dim})
    mapped |= renamed(
        weights,
        {
            "q": "q_proj",
            "proj": "out_proj",
            "query_embedding": "cosine.query_embedding",
            "temperature": "cosine.temperature",
            "relative_pos_bias_local": "window_bias",
            "learnable_tokens": "offset_keys",
            "learnable_bias": "offset_bias",
            "sr": "pool_proj",
            "norm": "pool_norm",
            "cpb_fc1": "pool_bias.fc1",
            "cpb_fc2": "pool_bias.fc2",
        },
    )
    fill(mixer, mapped)
    return mixer(x, grid=(config["height"], config["width"]))


def _conv_glu(recording: Recording, config: dict[str, int], x: Tensor) -> Tensor:
    weights = recording.parameters("glu.")
    hidden = weights["fc2.weight"].shape[1]
    glu = create_channel_mixer("conv_glu", dim=config["dim"], hidden=hidden).to(recording.dtype)
    fill(glu, renamed(weights, {"fc1": "up", "dwconv.dwconv": "conv", "fc2": "down"}))
    return glu(x, grid=(config["height"], config["width"]))


def run(recording: Recording) -> dict[str, Tensor]:
    x, config = recording.leaf("in/x"), _config(recording)
    y = _attention(recording, config, x)
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "out/conv_glu": _conv_glu(recording, config, x), "grad/x": x.grad}
