"""DaViT's dual block: window attention, then channel group attention, each between convolutional positions."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from attnlab import Tokens, create_mixer
from attnlab.channel_mixers import create_channel_mixer
from attnlab.models.block import Block
from attnlab.positions.convolutional import ConvolutionalPosition
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:channel_group", "mixer:window")


class _DualPart(nn.Module):
    """Convolutional position, then a block with another one in its middle."""

    def __init__(self, dim: int, mixer: nn.Module, weights: dict[str, Tensor], projections: tuple[str, ...]) -> None:
        super().__init__()
        hidden = weights["mlp.fc1.weight"].shape[0]
        self.before = ConvolutionalPosition(dim)
        between = ConvolutionalPosition(dim)
        channel_mixer = create_channel_mixer("mlp", dim=dim, hidden=hidden)
        self.block = Block(dim, mixer, channel_mixer, between=between)
        self.to(weights["norm1.weight"].dtype)
        fill(self.before, renamed(weights, {"cpe.0.proj": "conv"}))
        mapped = renamed(weights, {"cpe.1.proj": "between.conv", "norm1": "mixer_norm", "norm2": "channel_norm"})
        mapped |= renamed(weights, {"mlp.fc1": "channel_mixer.up", "mlp.fc2": "channel_mixer.down"})
        mapped |= rows(weights, "attn.qkv", {f"mixer.{name}": 3 * dim // len(projections) for name in projections})
        mapped |= renamed(weights, {"attn.proj": "mixer.out_proj"})
        fill(self.block, mapped)

    def forward(self, tokens: Tokens) -> Tokens:
        return self.block(self.before(tokens))


def _sizes(text: str) -> list[tuple[int, int, int | None]]:
    """(dim, heads or groups, window) of the blocks in the constructor's text."""
    found = []
    for name, inside in re.findall(r"(SpatialBlock|ChannelBlock)\(([^)]*)\)", text):
        dim = int(re.match(r"\s*(\d+)", inside).group(1))
        heads = int(re.search(r"(\d+)\s*(?:heads|groups)", inside).group(1))
        window = re.search(r"window\D*(\d+)", inside)
        found.append((dim, heads, int(window.group(1)) if window and name == "SpatialBlock" else None))
    return found


def run(recording: Recording) -> dict[str, Tensor]:
    config = recording.config
    (dim, heads, window), (_, groups, _) = _sizes(config["ctor"])
    weights = recording.parameters("spatial.")
    bias = "attn.qkv.bias" in weights
    spatial = create_mixer("window", dim, heads, window=window, border="zero_tokens", qkv_bias=bias)
    channel = create_mixer("channel_group", dim, groups, qkv_bias=bias)
    first = _DualPart(dim, spatial, weights, ("q_proj", "k_proj", "v_proj"))
    second = _DualPart(dim, channel, recording.parameters("channel."), ("in_proj",))
    x = recording.leaf("in/x")
    sides = re.search(r"grid (\d+)\s*x\s*(\d+)", config["x"])
    side = math.isqrt(x.shape[1])
    grid = (int(sides.group(1)), int(sides.group(2))) if sides else (side, side)
    after_spatial = first(Tokens(x, grid=grid))
    dual = second(after_spatial).x
    (dual * recording["in/w"]).sum().backward()
    results = {"out/y_dual": dual, "out/y_spatial_block": after_spatial.x, "grad/x": x.grad}
    with torch.no_grad():
        results["out/y_channel_attn_only"] = channel(x)
        results["out/y_window_attn_only_first_window_tokens"] = spatial(x[:, : window * window], grid=(window, window))
    return {key: value for key, value in results.items() if key in recording}
