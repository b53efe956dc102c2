"""CrossFormer's two blocks: attention in adjacent groups and in groups at an interval, with the dynamic position bias."""

from __future__ import annotations

import re

from einops import rearrange
from torch import Tensor

from attnlab import Mixer, create_mixer
from attnlab.core.windows import Windows
from golden.layers import layer_norm, mlp
from golden.recording import Recording, fill, renamed, rows

PROVES = ("position:dynamic_mlp",)
LATER = {"backbone"}  # a whole network; named models are not here yet

_CTOR = re.compile(r"CrossFormerBlock\((\d+),\((\d+),(\d+)\),(\d+) heads,group_size=(\d+),interval=(\d+)")
_MLP = {
    "pos_proj": "mlp.0",
    "pos1.0": "mlp.1",
    "pos1.2": "mlp.3",
    "pos2.0": "mlp.4",
    "pos2.2": "mlp.6",
    "pos3.0": "mlp.7",
    "pos3.2": "mlp.9",
}


def _mixer(weights: dict[str, Tensor], dim: int, heads: int) -> Mixer:
    """The attention of a group."""
    hidden = weights["pos.pos_proj.weight"].shape[0]
    options = {"position": "dynamic_mlp", "position_options": {"rank": 2, "hidden": hidden}}
    mixer = create_mixer("softmax", dim, heads, qkv_bias=True, **options).to(weights["proj.weight"].dtype)
    values = rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim}) | renamed(weights, {"proj": "out_proj"})
    fill(mixer, values | renamed(weights, {f"pos.{old}": f"position.{new}" for old, new in _MLP.items()}))
    return mixer


def _groups(x: Tensor, grid: tuple[int, int], size: int, interval: int) -> Tensor:
    """Tokens of a grid that all sizes divide as (groups, tokens of a group, c), row-major in a group."""
    sizes = {"gy": size, "gx": size, "iy": interval, "ix": interval, "y": grid[0] // (size * interval)}
    return rearrange(x, "b (y gy iy x gx ix) c -> (b y x iy ix) (gy gx) c", x=grid[1] // (size * interval), **sizes)


def _ungroup(x: Tensor, grid: tuple[int, int], size: int, interval: int) -> Tensor:
    sizes = {"gy": size, "gx": size, "iy": interval, "ix": interval, "y": grid[0] // (size * interval)}
    return rearrange(x, "(b y x iy ix) (gy gx) c -> b (y gy iy x gx ix) c", x=grid[1] // (size * interval), **sizes)


def _block(weights: dict[str, Tensor], x: Tensor, grid: tuple[int, int], heads: int, size: int, interval: int) -> Tensor:
    """One block; an interval of 1 makes groups of neighbours."""
    attention = {name[len("attn.") :]: value for name, value in weights.items() if name.startswith("attn.")}
    mixer = _mixer(attention, x.shape[-1], heads)
    padding = Windows(grid, (size * interval,) * 2)
    real = padding.pad(x.new_ones(x.shape[0], x.shape[1], 1))
    groups = _groups(padding.pad(layer_norm(weights, "norm1", x)), padding.padded, size, interval)
    taken = _groups(real, padding.padded, size, interval).squeeze(-1) > 0
    mixed = mixer(groups, mask=taken, grid=(size, size))
    x = x + padding.crop(_ungroup(mixed, padding.padded, size, interval))
    return x + mlp(weights, "mlp", layer_norm(weights, "norm2", x))


def run(recording: Recording) -> dict[str, Tensor]:
    _, height, width, heads, size, interval = map(int, _CTOR.match(recording.config["ctor"]).groups())
    grid = (height, width)
    weights = {name: recording.parameters(f"{name}.") for name in ("sda", "lda")}

    def block(name: str, x: Tensor) -> Tensor:
        if min(grid) <= size:
            return _block(weights[name], x, grid, heads, min(grid), 1)
        return _block(weights[name], x, grid, heads, size, 1 if name == "sda" else interval)

    x = recording.leaf("in/x")
    near = block("sda", x)
    pair = block("lda", near)
    (pair * recording["in/w"]).sum().backward()
    return {"out/y_pair": pair, "out/y_sda": near, "out/y_lda": block("lda", x), "grad/x": x.grad}
