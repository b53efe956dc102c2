"""EvEnhancer's local implicit decoder: a frame of a finer grid at each time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:local_implicit",)


def run(recording: Recording) -> dict[str, Tensor]:
    config, weights = recording.config, recording.parameters()
    names = sorted({key.removesuffix(".weight") for key in weights if key.startswith("mlp.") and key.endswith(".weight")})
    names.sort(key=lambda name: int(name.rsplit(".", 1)[1]))
    dim, channels = config["base_dim"], len(weights[f"{names[-1]}.weight"])
    hidden = [len(weights[f"{name}.weight"]) for name in names[:-1]]
    mixer = create_mixer("local_implicit", dim, config["head"], radius=config["r"], frames=config["r_t"], hidden=hidden)
    mixer = mixer.to(recording.dtype)
    values = renamed(weights, {f"conv_{name}s": f"{name}_proj" for name in "qkv"} | {names[0]: "first"})
    values |= renamed(weights, {name: f"layers.{number}" for number, name in enumerate(names[1:])})
    # Sines and cosines of time and row; what time gives is alike for all keys of a softmax.
    values["offset_bias.weight"] = weights["pb_encoder.proj.weight"].unflatten(1, (2, 2, -1))[:, :, 1].flatten(1)
    last = f"layers.{len(names) - 2}"
    values[f"{last}.weight"] = F.pad(values[f"{last}.weight"], (0, 0, 0, dim - channels))
    values[f"{last}.bias"] = F.pad(values[f"{last}.bias"], (0, dim - channels))
    fill(mixer, values)
    features = F.conv3d(recording["in/feat"], weights["conv_ch.weight"], weights["conv_ch.bias"], padding=1)
    grid = tuple(features.shape[2:])
    finer = [round(side * float(recording["in/scale"])) for side in grid[1:]]
    rows, columns = ((2 * torch.arange(side).double() + 1) / side - 1 for side in finer)
    results = {}
    for number, fraction in enumerate(recording["in/times"].double()):
        time = fraction * (grid[0] - 1)
        points = torch.stack(torch.meshgrid(time[None], rows, columns, indexing="ij"), dim=-1).flatten(0, 2)
        cell = (2 * grid[1] / finer[0], 2 * grid[2] / finer[1])
        found = mixer.sample(features.flatten(2).mT, points, grid=grid, cell=cell)[..., :channels]
        results[f"out/rgb{number}"] = found.mT.unflatten(2, finer)
    return results
