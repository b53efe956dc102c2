"""HAT: window attention with a table of offsets beside a convolution with channel attention, and overlapping windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from attnlab.core.windows import Windows
from attnlab.mixers.local.overlapping_window import offset_rows
from golden.layers import layer_norm, mlp
from golden.recording import Recording, fill, renamed, rows

PROVES = ("position:offset_table", "mixer:overlapping_window")


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
    config, weights, dim = recording.config, recording.parameters("overlap_attn."), x.shape[-1]
    mixer = create_mixer(
        "overlapping_window",
        dim,
        config["num_heads"],
        window=config["window_size"],
        overlap=config["overlap_ratio"],
        relative_bias=True,
        rank=2,
        qkv_bias="qkv.bias" in weights,
    ).to(x.dtype)
    values = rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim}) | renamed(weights, {"proj": "out_proj"})
    # The recorded index says which entry a pair has, ours where that stands here: one is a permutation of the other.
    ours = offset_rows((mixer.window,) * 2, (mixer.key_window,) * 2)
    table = mixer.table.detach().flatten(1).mT.clone()
    table[ours.flatten()] = weights["relative_position_bias_table"][recording["in/rpi_oca"].flatten()]
    fill(mixer, values | {"table": table.mT})
    x = x + mixer(layer_norm(weights, "norm1", x), grid=grid)
    return x + mlp(weights, "mlp", layer_norm(weights, "norm2", x))


def run(recording: Recording) -> dict[str, Tensor]:
    grid = (int(recording["in/H"]), int(recording["in/W"]))
    x = recording.leaf("in/x")
    first = _hybrid(recording, 0, x, grid)
    second = _hybrid(recording, 1, first, grid)
    y = _overlapping(recording, second, grid)
    (y * recording["in/w"]).sum().backward()
    return {"out/hab0": first, "out/hab1_shifted": second, "out/y": y, "grad/x": x.grad}
