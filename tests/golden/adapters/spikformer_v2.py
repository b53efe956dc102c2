"""Spiking self-attention and the spiking perceptron on recorded spikes."""

from __future__ import annotations

import re

from torch import Tensor

from attnlab import create_mixer, record
from attnlab.channel_mixers import create_channel_mixer
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:spiking", "channel_mixer:spiking_mlp")


def _names(pairs: dict[str, str]) -> dict[str, str]:
    """Official beginnings of names to ours, for layers of a convolution and a norm."""
    names = {f"{old}_conv": f"{new}.linear.conv" for old, new in pairs.items()}
    return names | {f"{old}_bn": f"{new}.linear.norm" for old, new in pairs.items()}


def run(recording: Recording) -> dict[str, Tensor]:
    attention, mlp = recording.parameters("attn."), recording.parameters("mlp.")
    x = recording.leaf("in/x")
    dim = x.shape[2]
    heads = re.search(r"SSA\(.*?num_heads\s*=\s*(\d+)", recording.config["ctor"])
    mixer = create_mixer("spiking", dim, int(heads[1]) if heads else 8).to(recording.dtype).eval()
    fill(mixer, renamed(attention, _names({"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "out_proj"})))
    tokens = x.flatten(3).transpose(2, 3)
    with record(mixer) as tape:
        spikes = mixer.spike(tokens)
    y = spikes.transpose(2, 3).reshape(x.shape)
    (y * recording["in/w"]).sum().backward()
    results = {"out/y": y, "grad/x": x.grad}
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("attention", "attn")):
        results[f"out/{theirs}_spikes"] = tape[f"{ours}_spikes"].transpose(2, 3)
    perceptron = create_channel_mixer("spiking_mlp", dim, hidden=mlp["fc1_conv.weight"].shape[0]).to(recording.dtype).eval()
    fill(perceptron, renamed(mlp, _names({"fc1": "up", "fc2": "down"})))
    results["out/mlp"] = perceptron.spike(tokens.detach()).transpose(2, 3).reshape(x.shape)
    return {key: value for key, value in results.items() if key in recording}
