"""Gaussian adaptive attention along any axis, alone and in residual layers."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from attnlab import Mixer, create_mixer, record
from golden.recording import Recording, fill

PROVES = ("mixer:gaam",)


def _mixer(recording: Recording, prefix: str, axis: str, dim: int) -> Mixer:
    """The layer whose chunks' parameters stand under ``prefix``, in their order."""
    weights = recording.parameters(prefix)
    chunks = len({name.split(".")[0] for name in weights})
    offset, width = (torch.stack([weights[f"{i}.{name}"] for i in range(chunks)]) for name in ("mean_offsets", "c"))
    mixer = create_mixer("gaam", dim, 1, num_gaussians=offset.shape[1], num_chunks=chunks, axis=axis).to(recording.dtype)
    fill(mixer, {"offset": offset, "width": width})
    return mixer


def _apply(recording: Recording, prefix: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and weights, in x's shape: the axis is the channels if it is the last one, else it is made the tokens."""
    axis = recording.config["norm_axis"] % x.dim()
    last = axis == x.dim() - 1
    moved = x if last else x.movedim(axis, 1)
    flat = moved.reshape(1, -1, x.shape[-1]) if last else moved.reshape(moved.shape[0], moved.shape[1], -1)
    mixer = _mixer(recording, prefix, "channels" if last else "tokens", flat.shape[2])
    with record(mixer) as tape:
        y = mixer(flat)
    both = (tensor.reshape(moved.shape) for tensor in (y, tape["feature_weights"]))
    y, weights = (tensor if last else tensor.movedim(1, axis) for tensor in both)
    return y, weights


def run(recording: Recording) -> dict[str, Tensor]:
    x = recording.leaf("in/x")
    y, weights = _apply(recording, "attention_heads.", x)
    (y * recording["in/w"]).sum().backward()
    results = {"out/y": y, "out/attention": weights, "grad/x": x.grad}
    layers = {match[1] for name in recording.parameters("block.") if (match := re.match(r"layers\.(\d+)\.", name))}
    stream = recording["in/x"]
    for layer in sorted(layers, key=int):
        stream = stream + _apply(recording, f"block.layers.{layer}.attention_heads.", stream)[0]
    results["out/block_y"] = stream
    return {key: value for key, value in results.items() if key in recording}
