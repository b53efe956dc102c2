"""CSWin's block: attention in vertical and in horizontal stripes side by side, with LePE inside each stripe."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from attnlab import Mixer, create_mixer
from golden.layers import layer_norm, mlp
from golden.recording import Recording, fill, renamed, rows

PROVES = ("position:lepe", "mixer:cross_shaped")
LATER = {"backbone"}  # a whole network; named models are not here yet

_CTOR = re.compile(r"CSWinBlock\(dim=(\d+),reso=(\d+),num_heads=(\d+),split_size=(\d+)")
_KINDS = ("weight", "bias")


def _mixer(weights: dict[str, Tensor], heads: int, stripe: int) -> Mixer:
    """The attention with what one convolution a branch becomes: the halves of the channels, or all of them as halves."""
    dim = weights["proj.weight"].shape[1]
    kernels = [torch.cat([weights[name] for name in sorted(weights) if name.endswith(f"get_v.{kind}")]) for kind in _KINDS]
    mixer = create_mixer(
        "cross_shaped", dim, heads, stripe=stripe, lepe_kernel=kernels[0].shape[-1], qkv_bias="qkv.bias" in weights
    ).to(weights["proj.weight"].dtype)
    values = rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim}) | renamed(weights, {"proj": "out_proj"})
    widths = [count * dim // heads for count in mixer.heads]
    for kind, kernel in zip(_KINDS, kernels, strict=True):
        values |= {f"lepe.{i}.conv.{kind}": part for i, part in enumerate(kernel.split(widths))}
    fill(mixer, values)
    return mixer


def run(recording: Recording) -> dict[str, Tensor]:
    _, side, heads, split = map(int, _CTOR.match(recording.config["ctor"]).groups())
    weights = recording.parameters()
    branches = sum(name.endswith("get_v.weight") for name in weights)
    mixer = _mixer(weights, heads, split if branches == 2 else side)
    inner: list[Tensor] = []  # what comes before the projection
    mixer.out_proj.register_forward_pre_hook(lambda _, inputs: inner.append(inputs[0]))
    x = recording.leaf("in/x")
    y = x + mixer(layer_norm(weights, "norm1", x), grid=(side, side))
    y = y + mlp(weights, "mlp", layer_norm(weights, "norm2", y))
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "out/attn_concat": inner[0], "grad/x": x.grad}
