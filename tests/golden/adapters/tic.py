"""TiC's MSA-Conv, whose convolution may give another number of channels than the tokens have."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer, record
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:msa_conv",)


def _weights(matrix: Tensor, grid: tuple[int, int], window: int, dilation: int) -> Tensor:
    """The weights of each window's places: what the map lacks is shared by the places outside of it, whose logits are all 0."""
    table = torch.arange(1, matrix.shape[-1] + 1).view(1, 1, *grid).to(matrix.dtype)
    cells = F.unfold(table, window, padding=dilation * (window // 2), dilation=dilation)[0].T.long()
    inside = cells > 0
    known = matrix.gather(-1, (cells - 1).clamp(min=0).expand(len(matrix), -1, -1)) * inside
    share = (1 - known.sum(-1, keepdim=True)) / (~inside).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(inside, known, share).mT.unflatten(2, grid)


def run(recording: Recording) -> dict[str, Tensor]:
    options = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", recording.config["ctor"])}
    weights = recording.parameters()
    window, dilation = options["kernel_size"], options.get("dilation", 1)
    x = recording.leaf("in/x")
    dim, grid = x.shape[1], tuple(x.shape[2:])
    kernels = weights["mlp.weight"]
    outputs = []
    # As many output channels at a time as there are tokens' channels; the last time some are filled up.
    for rows, bias in zip(kernels.split(dim), weights.get("mlp.bias", kernels[:, 0, 0, 0] * 0).split(dim), strict=True):
        mixer = create_mixer("msa_conv", dim, window=window, dilation=dilation, conv_bias=True).to(recording.dtype)
        missing = dim - len(rows)
        values = {"conv.weight": F.pad(rows, (0, 0) * 3 + (0, missing)), "conv.bias": F.pad(bias, (0, missing))}
        fill(mixer, renamed(weights, {"qkv_conv": "in_proj"}) | values)
        with record(mixer) as tape:
            outputs.append(mixer(x.flatten(2).mT, grid=grid).mT[:, : len(rows)])
    y = torch.cat(outputs, dim=1).unflatten(2, grid)
    (y * recording["in/w"]).sum().backward()
    return {
        "out/y": y,
        "out/core": tape["mixed"].squeeze(1).mT.unflatten(2, grid),
        "out/attn": _weights(tape["attention"].squeeze(1), grid, window, dilation),
        "grad/x": x.grad,
    }
