"""CSWin's block: attention in vertical and in horizontal stripes side by side, with LePE inside each stripe."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from attnlab import Mixer, create_mixer
from attnlab.core.windows import Windows
from golden.layers import layer_norm, linear, mlp
from golden.recording import Recording, fill, renamed

PROVES = ("position:lepe",)
LATER = {"backbone"}  # a whole network; named models are not here yet

_CTOR = re.compile(r"CSWinBlock\(dim=(\d+),reso=(\d+),num_heads=(\d+),split_size=(\d+)")


def _branch(weights: dict[str, Tensor], index: int, branches: int, heads: int) -> Mixer:
    """The attention of one branch, which puts what its heads say into its own channels; the projection comes after all."""
    dim = weights["proj.weight"].shape[1]
    width = dim // branches
    mixer = create_mixer(
        "softmax",
        dim,
        heads // branches,
        head_dim=dim // heads,
        qkv_bias="qkv.bias" in weights,
        out_bias=False,
        position="lepe",
        position_options={"kernel_size": weights[f"attns.{index}.get_v.weight"].shape[-1]},
    )
    values = renamed(weights, {f"attns.{index}.get_v": "position.conv"})
    values["out_proj.weight"] = torch.eye(dim, dtype=weights["proj.weight"].dtype)[:, index * width : (index + 1) * width]
    for kind in ("weight", "bias"):
        if f"qkv.{kind}" in weights:
            parts = weights[f"qkv.{kind}"].chunk(3)
            names = ("q_proj", "k_proj", "v_proj")
            values |= {f"{n}.{kind}": p.split(width)[index] for n, p in zip(names, parts, strict=True)}
    mixer = mixer.to(weights["proj.weight"].dtype)
    fill(mixer, values)
    return mixer


def run(recording: Recording) -> dict[str, Tensor]:
    _, side, heads, split = map(int, _CTOR.match(recording.config["ctor"]).groups())
    weights = recording.parameters()
    branches = sum(name.endswith("get_v.weight") for name in weights)
    shapes = [(side, split), (split, side)] if branches == 2 else [(side, side)]
    x = recording.leaf("in/x")
    normed = layer_norm(weights, "norm1", x)
    mixed = []
    for index, shape in enumerate(shapes):
        stripes = Windows((side, side), shape)
        tokens = stripes.split(normed)
        y = _branch(weights, index, branches, heads)(tokens.flatten(0, 1), grid=shape)
        mixed.append(stripes.merge(y.unflatten(0, tokens.shape[:2])))
    joined = torch.stack(mixed).sum(0)
    y = x + linear(weights, "proj", joined)
    y = y + mlp(weights, "mlp", layer_norm(weights, "norm2", y))
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "out/attn_concat": joined, "grad/x": x.grad}
