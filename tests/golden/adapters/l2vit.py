"""L2ViT's two blocks: linear attention with local concentration, and window attention."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import Tokens, create_mixer
from attnlab.core.grid import Grid
from attnlab.positions.convolutional import ConvolutionalPosition
from golden.layers import layer_norm, mlp
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:enhanced_linear", "mixer:local_concentration", "mixer:window")

_QKV = ("q_proj", "k_proj", "v_proj")
_CONCENTRATION = {"conv1": "first", "bn": "norm", "conv2": "second"}


def _attention(name: str, weights: dict[str, Tensor], heads: int, **options: object) -> torch.nn.Module:
    dim = weights["norm1.weight"].shape[0]
    mixer = create_mixer(name, dim, heads, qkv_bias="attn.qkv.bias" in weights, **options)
    values = rows(weights, "attn.qkv", dict.fromkeys(_QKV, dim))
    names = {"attn.proj": "out_proj", "attn.temperature": "normalizer.temperature"}
    fill(mixer.to(weights["norm1.weight"].dtype), values | renamed(weights, names))
    return mixer


def _position(weights: dict[str, Tensor], number: int, x: Tensor, grid: Grid) -> Tensor:
    """The tokens with their 3 x 3 neighbourhood added."""
    conv = ConvolutionalPosition(x.shape[-1]).to(x.dtype)
    fill(conv, renamed(weights, {f"cpe.{number}.proj": "conv"}))
    return conv(Tokens(x, grid=grid)).x


def _concentrate(weights: dict[str, Tensor], x: Tensor, grid: Grid) -> Tensor:
    size = weights["local_mp.conv1.weight"].shape[-1]
    part = create_mixer("local_concentration", x.shape[-1], kernel_size=size).to(x.dtype).eval()
    fill(part, renamed(weights, {f"local_mp.{old}": new for old, new in _CONCENTRATION.items()}))
    return part(x, grid=grid)


def _linear_block(weights: dict[str, Tensor], x: Tensor, grid: Grid, heads: int) -> Tensor:
    x = _position(weights, 0, x, grid)
    x = x + _attention("enhanced_linear", weights, heads)(layer_norm(weights, "norm1", x))
    if "local_mp.conv1.weight" in weights:
        x = x + _concentrate(weights, layer_norm(weights, "norm3", x), grid)
    return x + mlp(weights, "mlp", layer_norm(weights, "norm2", x))


def _window_block(weights: dict[str, Tensor], x: Tensor, grid: Grid, heads: int, window: int) -> Tensor:
    x = _position(weights, 0, x, grid)
    mixer = _attention("window", weights, heads, window=window, border="zero_tokens")
    x = x + mixer(layer_norm(weights, "norm1", x), grid=grid)
    x = _position(weights, 1, x, grid)
    return x + mlp(weights, "mlp", layer_norm(weights, "norm2", x))


def run(recording: Recording) -> dict[str, Tensor]:
    config = recording.config
    grid = (int(recording["in/hw"][0]), int(recording["in/hw"][1]))
    heads, results = config["heads"], {}
    for name in ("lga", "lwa"):
        weights, x = recording.parameters(f"{name}."), recording.leaf(f"in/{name}_x")
        if name == "lga":
            y = _linear_block(weights, x, grid, heads)
            results["out/lga_attn_only"] = _attention("enhanced_linear", weights, heads)(x.detach())
        else:
            y = _window_block(weights, x, grid, heads, config["window"])
        (y * recording[f"in/{name}_w"]).sum().backward()
        results |= {f"out/{name}": y, f"grad/{name}_x": x.grad}
    return results
