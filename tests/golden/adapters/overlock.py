"""OverLoCK's block around context-mixing dynamic convolution, in evaluation mode."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer, record
from golden.layers import layer_norm
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:contextual_mixing",)
LATER = {"backbone"}  # a whole network; named models are not here yet


def _conv(weights: dict[str, Tensor], name: str, x: Tensor, dilation: int = 1) -> Tensor:
    """A convolution that keeps the size, depthwise where its kernels have one channel."""
    kernel = weights[f"{name}.weight"]
    padding = dilation * (kernel.shape[-1] // 2)
    groups = x.shape[1] // kernel.shape[1]
    return F.conv2d(x, kernel, weights.get(f"{name}.bias"), padding=padding, dilation=dilation, groups=groups)


def _norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, variance, scale, shift = (weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, variance, scale, shift)


def _channels(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return layer_norm(weights, name, x.movedim(1, -1), eps=1e-6).movedim(-1, 1)


def _local(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Parallel depthwise convolutions of several sizes and dilations, each with its norm."""
    y = _norm(weights, "lepe.0.origin_bn", _conv(weights, "lepe.0.lk_origin", x))
    for kernel, dilation in {re.search(r"k(\d+)_(\d+)", key).groups() for key in weights if key.startswith("lepe.0.dil_conv")}:
        branch = _conv(weights, f"lepe.0.dil_conv_k{kernel}_{dilation}", x, int(dilation))
        y = y + _norm(weights, f"lepe.0.dil_bn_k{kernel}_{dilation}", branch)
    return _norm(weights, "lepe.1", y)


def _mlp(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    y = F.gelu(_conv(weights, "mlp.0", x))
    y = y + _conv(weights, "mlp.2", y)
    size = y.norm(dim=(2, 3), keepdim=True)
    y = (weights["mlp.3.gamma"] * size / (size.mean(1, keepdim=True) + 1e-6) + 1) * y + weights["mlp.3.beta"]
    return _conv(weights, "mlp.4", y)


def run(recording: Recording) -> dict[str, Tensor]:
    text, weights = recording.config["ctor"], recording.parameters("block.")
    options = dict(re.findall(r"(\w+)=(\w+)", text))
    window, small = int(options["kernel_size"]), int(options["smk_size"])
    x = recording.leaf("in/x")
    dim, grid = x.shape[1], tuple(x.shape[2:])
    mixer = create_mixer("contextual_mixing", dim, 4 * int(options["num_heads"]), window=window, small_window=small)
    mixer = mixer.to(recording.dtype).eval()
    names = {"weight_query.0": "q_proj.conv", "weight_query.1": "q_proj.norm", "weight_key.1": "k_proj.conv"}
    names |= {"weight_key.2": "k_proj.norm", "weight_value.0": "v_proj.conv", "weight_value.1": "v_proj.norm"}
    names |= {"weight_proj": "kernel_proj", "rpb1": "tables.0", "rpb2": "tables.1"}
    fill(mixer, renamed(weights, names | {"fusion_proj.0": "out_proj.conv", "fusion_proj.1": "out_proj.norm"}))
    start = x + _conv(weights, "dwconv1", x)
    normed = _channels(weights, "norm1", start)
    with record(mixer) as tape:
        mixed = mixer(normed.flatten(2).mT, grid=grid).mT.unflatten(2, grid)
    y = mixed + _local(weights, normed)
    squeezed = F.gelu(_conv(weights, "se_layer.proj.1", y.mean((2, 3), keepdim=True)))
    y = y * _conv(weights, "se_layer.proj.3", squeezed).sigmoid()
    y = F.silu(_norm(weights, "gate.1", _conv(weights, "gate.0", normed))) * y
    y = _conv(weights, "proj.1", _norm(weights, "proj.0", y))
    after = _conv(weights, "ls1", start) + y if options["res_scale"] == "True" else start + _conv(weights, "ls1", y)
    after = after + _conv(weights, "dwconv2", after)
    inner = _mlp(weights, _channels(weights, "norm2", after))
    out = _conv(weights, "ls2", after) + inner if options["res_scale"] == "True" else after + _conv(weights, "ls2", inner)
    (out * recording["in/w"]).sum().backward()
    heads = tape["mixed"].detach()
    return {"out/y": out, "out/dyconv": torch.cat(heads.unbind(1), -1).mT.unflatten(2, grid), "grad/x": x.grad}
