"""ISTA-Net's block, assembled around the mixer, and the cutting of clips into windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from attnlab import create_mixer
from attnlab.mixers.parts.conv_bn import ConvBN
from attnlab.mixers.parts.strided_windows import strided_windows
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:tanh_map",)


def _mixer(recording: Recording, config: dict) -> torch.nn.Module:
    weights, heads, width = recording.parameters(), config["heads"], config["qkv_dim"]
    t, j, e = config["window"]
    inner, channels, kernel = t * j * e, config["in_channels"], config["kernel"][1]
    mixer = create_mixer(
        "tanh_map",
        inner * channels,
        1,
        num_tokens=config["tokens"],
        inner=inner,
        num_maps=heads,
        qk_dim=width,
        kernel_size=kernel,
    )
    if config["out_channels"] != channels:  # their blocks may widen the tokens, which no mixer of ours does
        mixer.out_proj = ConvBN(heads * channels, config["out_channels"], kernel, rank=1, bias=True)
    # their map has the source first: what they call queries are our keys
    halves = {kind: weights[f"to_qkvs.{kind}"].flatten(1 if kind == "weight" else 0).chunk(2) for kind in ("weight", "bias")}
    mapped = {f"{name}.{kind}": halves[kind][i] for i, name in enumerate(("k_proj", "q_proj")) for kind in halves}
    mapped |= {"alpha": weights["alpha"], "token_map": weights["M"].squeeze(0).mT}
    fill(mixer, mapped | renamed(weights, {"proj.0": "out_proj.conv", "proj.1": "out_proj.norm"}))
    return mixer.to(recording.dtype).eval()


def _conv_bn(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A recorded convolution over (b, c, t, v, u) and its norm in evaluation."""
    kernel = weights[f"{name}.0.weight"]
    y = F.conv3d(x, kernel, weights[f"{name}.0.bias"], padding=tuple(side // 2 for side in kernel.shape[2:]))
    stats = (weights[f"{name}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(y, *stats)


def run(recording: Recording) -> dict[str, Tensor]:
    weights, config = recording.parameters(), recording.config
    t, j, e = config["window"]
    x = recording.leaf("in/x")

    def residual(name: str, y: Tensor) -> Tensor:
        return _conv_bn(weights, name, y) if f"{name}.0.weight" in weights else y

    tokens = rearrange(x, "b c t v u -> b u (t v c)")
    mixed = rearrange(_mixer(recording, config)(tokens), "b u (t v c) -> b c t v u", t=t, v=j * e)
    y = F.leaky_relu(mixed + residual("residual", x), 0.1)
    y = F.leaky_relu(_conv_bn(weights, "FFN", y) + residual("residual", x), 0.1)
    y = F.leaky_relu(_conv_bn(weights, "TA", y) + residual("residual_TA", y), 0.1)
    (y * recording["in/w"]).sum().backward()
    results = {"out/y": y, "grad/x": x.grad}
    for key in recording.tensors:
        if key.startswith("out/partition_"):
            results[key] = strided_windows(recording["in/partition_x"], [int(side) for side in key.split("_")[1:]])
    return results
