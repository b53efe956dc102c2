"""SHViT's single-head attention."""

from __future__ import annotations

from torch import Tensor, nn

from attnlab import create_mixer
from attnlab.core.grid import from_grid, to_grid
from golden.conv_bn import conv_bn
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:single_head",)


def _mixer(config: dict, weights: dict[str, Tensor]) -> nn.Module:
    mixer = create_mixer("single_head", config["dim"], attended=config["pdim"], key_dim=config["qk_dim"])
    mixer = mixer.to(weights["qkv.c.weight"].dtype)
    fill(mixer, renamed(conv_bn(weights), {"pre_norm": "norm", "qkv": "qkv", "proj.1": "out_proj"}))
    return mixer.eval()


def run(recording: Recording) -> dict[str, Tensor]:
    image = recording.leaf("in/x")
    grid = tuple(image.shape[2:])
    y = to_grid(_mixer(recording.config, recording.parameters())(from_grid(image), grid=grid), grid)
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "grad/x": image.grad}
