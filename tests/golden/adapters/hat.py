"""HAT: window attention with a table of offsets beside a convolution with channel attention, and overlapping windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from attnlab import create_mixer
from attnlab.core.windows import Windows
from attnlab.ops.attention import attention
from golden.layers import layer_norm, linear, mlp
from golden.recording import Recording, fill, renamed, rows

PROVES = ("position:offset_table",)


def _conv(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    kernel = weights[f"{name}.weight"]
    return F.conv2d(x, kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2)


def _convolutional(weights: dict[str, Tensor], x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The branch beside the attention: two convolutions, weighed by channel."""
    image = x.mT.unflatten(-1, grid)
    y = _conv(weights, "cab.2", F.gelu(_conv(weights, "cab.0", image)))
    squeezed = F.relu(_conv(weights, "cab.3.attention.1", y.mean((2, 3), keepdim=True)))
    return (y * _conv(weights, "cab.3.attention.3", squeezed).sigmoid()).flatten(2).mT


def _in_windows(weights: dict[str, Tensor], x: Tensor, grid: tuple[int, int], side: int, heads: int, shift: int) -> Tensor:
    """Window attention on the grid rolled by ``shift``, where tokens from two ends of the grid do not see each other."""
    dim = x.shape[-1]
    mixer = create_mixer("softmax", dim, heads, qkv_bias=True, position="offset_table", position_options={"size": side}).to(
        x.dtype
    )
    values = rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim}) | renamed(weights, {"proj": "out_proj"})
    fill(mixer, values | {"position.table": weights["relative_position_bias_table"].T})
    windows = Windows(grid, (side, side))

    def rolled(tokens: Tensor, by: int) -> Tensor:
        return tokens.unflatten(1, grid).roll((by, by), dims=(1, 2)).flatten(1, 2)

    # Cells that were at an end before the roll, and those rolled in behind them, are of different regions.
    ends = [((torch.arange(size) + shift) // size) if shift else torch.zeros(size, dtype=torch.int64) for size in grid]
    region = (2 * ends[0][:, None] + ends[1]).view(1, -1, 1)
    region = windows.split(region).squeeze(-1)
    allowed = (region[..., :, None] == region[..., None, :]).expand(x.shape[0], -1, -1, -1).flatten(0, 1)
    tokens = windows.split(rolled(x, -shift))
    y = mixer(tokens.flatten(0, 1), pair_mask=allowed.unsqueeze(1), grid=(side, side))
    return rolled(windows.merge(y.unflatten(0, tokens.shape[:2])), shift)


def _hybrid(recording: Recording, index: int, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A hybrid attention block; every second one has shifted windows."""
    config, weights = recording.config, recording.parameters(f"blocks.{index}.")
    side = config["window_size"]
    normed = layer_norm(weights, "norm1", x)
    attention_weights = recording.parameters(f"blocks.{index}.attn.")
    mixed = _in_windows(attention_weights, normed, grid, side, config["num_heads"], side // 2 if index % 2 else 0)
    x = x + mixed + config["conv_scale"] * _convolutional(recording.parameters(f"blocks.{index}.conv_block."), normed, grid)
    return x + mlp(weights, "mlp", layer_norm(weights, "norm2", x))


def _overlapping(recording: Recording, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Windows of queries read larger windows of keys; cells outside the grid are zero keys that take part."""
    config, weights = recording.config, recording.parameters("overlap_attn.")
    side, heads = config["window_size"], config["num_heads"]
    reach = side + int(config["overlap_ratio"] * side)
    q, k, v = linear(weights, "qkv", layer_norm(weights, "norm1", x)).chunk(3, dim=-1)
    windows = Windows(grid, (side, side))
    q = rearrange(windows.split(q), "b w s (h d) -> (b w) h s d", h=heads)
    maps = torch.cat((k, v), dim=-1).mT.unflatten(-1, grid)
    patches = F.unfold(maps, reach, stride=side, padding=(reach - side) // 2)
    k, v = rearrange(patches, "b (kv h d s) w -> kv (b w) h s d", kv=2, h=heads, s=reach**2)
    bias = weights["relative_position_bias_table"][recording["in/rpi_oca"]].permute(2, 0, 1)[None]
    mixed = rearrange(attention(q, k, v, bias=bias), "(b w) h s d -> b w s (h d)", b=x.shape[0])
    x = x + linear(weights, "proj", windows.merge(mixed))
    return x + mlp(weights, "mlp", layer_norm(weights, "norm2", x))


def run(recording: Recording) -> dict[str, Tensor]:
    grid = (int(recording["in/H"]), int(recording["in/W"]))
    x = recording.leaf("in/x")
    first = _hybrid(recording, 0, x, grid)
    second = _hybrid(recording, 1, first, grid)
    y = _overlapping(recording, second, grid)
    (y * recording["in/w"]).sum().backward()
    return {"out/hab0": first, "out/hab1_shifted": second, "out/y": y, "grad/x": x.grad}
