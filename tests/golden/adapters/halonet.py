"""Halo attention as timm reads the paper, whose authors published no code; with strides its output is a smaller map."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill

PROVES = ("mixer:halo",)


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    weights = recording.parameters(f"{name}.")
    heads, dim, relative = config["num_heads"], config["dim"], "pos_embed.height_rel" in weights
    head_dim = weights["q.weight"].shape[0] // heads
    inner = heads * head_dim
    mixer = create_mixer(
        "halo",
        dim,
        heads,
        head_dim=head_dim,
        block=config["block_size"],
        halo=config["halo_size"],
        relative_logits=relative,
        rank=2,
        scaled_logits=config.get("scale_pos_embed", False),
        qkv_bias="q.bias" in weights,
        out_bias=False,
    ).to(recording.dtype)
    # timm has no output projection: heads are what comes before it
    values = {"out_proj.weight": torch.eye(dim, inner, dtype=recording.dtype)}
    for kind in ("weight", "bias"):
        if f"q.{kind}" in weights:
            values[f"q_proj.{kind}"] = weights[f"q.{kind}"]
            pairs = rearrange(weights[f"kv.{kind}"], "(h p d) ... -> p (h d) ...", h=heads, p=2)
            values |= {f"{part}_proj.{kind}": pair for part, pair in zip("kv", pairs, strict=True)}
    if relative:
        values |= {f"tables.{i}": weights[f"pos_embed.{side}_rel"] for i, side in enumerate(("height", "width"))}
    fill(mixer, values)
    found: list[Tensor] = []
    mixer.out_proj.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    x = recording.leaf(f"in/{name}.x")
    grid, stride = tuple(x.shape[2:]), config.get("stride", 1)
    tokens = x.flatten(2).mT
    if stride == 1:
        mixer(tokens, grid=grid)
    else:
        mixer.downsample(tokens, stride=stride, grid=grid)
    y = found[0].mT.unflatten(-1, tuple(-(-n // stride) for n in grid))
    (y * recording[f"in/{name}.w"]).sum().backward()
    return {f"out/{name}.y": y, f"grad/{name}.x": x.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    """Every recorded configuration."""
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
