"""MaxViT's block: MBConv, then block attention and grid attention, each with its MLP."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from golden.layers import layer_norm, linear
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:multi_axis",)
LATER = {"backbone"}  # a whole network; named models are not here yet


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around an image as TensorFlow's "same" puts them: the odd one at the bottom and right."""
    extra = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:]]
    return F.pad(x, (extra[1] // 2, extra[1] - extra[1] // 2, extra[0] // 2, extra[0] - extra[0] // 2))


def _norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Batch norm by the recorded statistics."""
    statistics = (weights[f"{name}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *statistics, eps=1e-3)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _mbconv(weights: dict[str, Tensor], x: Tensor, stride: int) -> Tensor:
    """The inverted bottleneck with squeeze and excitation."""
    depthwise = weights["conv2_kxk.weight"]
    kernel, width = depthwise.shape[-1], depthwise.shape[0]
    y = F.conv2d(_norm(weights, "pre_norm", x), weights["conv1_1x1.weight"])
    y = _same(_gelu(_norm(weights, "norm1", y)), kernel, stride)
    y = _gelu(_norm(weights, "norm2", F.conv2d(y, depthwise, stride=stride, groups=width)))
    squeezed = F.silu(F.conv2d(y.mean((2, 3), keepdim=True), weights["se.fc1.weight"], weights["se.fc1.bias"]))
    y = y * F.conv2d(squeezed, weights["se.fc2.weight"], weights["se.fc2.bias"]).sigmoid()
    y = F.conv2d(y, weights["conv3_1x1.weight"], weights["conv3_1x1.bias"])
    if stride > 1:
        # zeros of the border are not counted in the mean
        ones = torch.ones_like(x[:1, :1])
        x, count = (F.avg_pool2d(_same(t, stride, stride), stride, stride) for t in (x, ones))
        x = x / count
    if "shortcut.expand.weight" in weights:
        x = F.conv2d(x, weights["shortcut.expand.weight"], weights["shortcut.expand.bias"])
    return x + y


def _half(weights: dict[str, Tensor], x: Tensor, grid: tuple[int, int], part: str) -> Tensor:
    """One attention with its MLP; the recorded table tells heads and window."""
    dim, table = x.shape[-1], weights["attn.rel_pos.relative_position_bias_table"]
    heads, window = table.shape[0], (table.shape[1] + 1) // 2
    position = {"size": window, "rank": 2, "direction": "key_minus_query"}
    mixer = create_mixer(
        "multi_axis",
        dim,
        heads,
        part=part,
        window=window,
        qkv_bias="attn.qkv.bias" in weights,
        position="offset_table",
        position_options=position,
    ).to(x.dtype)
    values = rows(weights, "attn.qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim})
    fill(mixer, values | renamed(weights, {"attn.proj": "out_proj"}) | {"position.table": table})
    x = x + mixer(layer_norm(weights, "norm1", x), grid=grid)
    return x + linear(weights, "mlp.fc2", _gelu(linear(weights, "mlp.fc1", layer_norm(weights, "norm2", x))))


def run(recording: Recording) -> dict[str, Tensor]:
    stride = re.search(r"stride=(\d+)", recording.config["ctor"])
    x = recording.leaf("in/x")
    conv = _mbconv(recording.parameters("block.conv."), x, int(stride.group(1)) if stride else 1)
    grid = tuple(conv.shape[2:])
    near = _half(recording.parameters("block.attn_block."), conv.flatten(2).mT, grid, "block")
    far = _half(recording.parameters("block.attn_grid."), near, grid, "grid")
    y = far.mT.unflatten(-1, grid)
    (y * recording["in/w"]).sum().backward()
    return {
        "out/y": y,
        "out/mbconv": conv,
        "out/after_block_attn": near.unflatten(1, grid),
        "out/after_grid_attn": far.unflatten(1, grid),
        "grad/x": x.grad,
    }
