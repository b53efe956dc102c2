"""The PoolFormer block."""

from __future__ import annotations

from torch import Tensor

from attnlab import Tokens, create_mixer
from attnlab.channel_mixers import create_channel_mixer
from attnlab.core.grid import from_grid, to_grid
from attnlab.models.block import Block
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:pooling",)


def run(recording: Recording) -> dict[str, Tensor]:
    config, weights = recording.config, recording.parameters()
    dim = config["dim"]
    scaled = "layer_scale_1" in weights
    block = Block(
        dim,
        create_mixer("pooling", dim, size=config["pool_size"]),
        create_channel_mixer("mlp", dim=dim, hidden=weights["mlp.fc1.weight"].shape[0]),
        norm="group_norm",
        layer_scale=1.0 if scaled else None,
    ).to(recording.dtype)
    names = {"norm1": "mixer_norm", "norm2": "channel_norm", "mlp.fc1": "channel_mixer.up", "mlp.fc2": "channel_mixer.down"}
    fill(block, renamed(weights, names | {"layer_scale_1": "mixer_residual.scale", "layer_scale_2": "channel_residual.scale"}))
    x = recording.leaf("in/x")
    grid = tuple(x.shape[2:])
    y = to_grid(block(Tokens(from_grid(x), grid=grid)).x, grid)
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "grad/x": x.grad}
