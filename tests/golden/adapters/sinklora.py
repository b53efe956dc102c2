"""The released shifted sparse attention, whose shifted heads see a ring."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.core.masks import Masks
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:shifted_sparse",)


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    heads, group = config["heads"], int(config["group_ratio"] * config["N"])
    mixer = create_mixer(
        "shifted_sparse", config["dim"], heads, num_kv_heads=config["kv_heads"], group=group, wrapped=True, out_bias=False
    ).to(recording.dtype)
    fill(
        mixer, renamed(recording.parameters(f"{name}."), {p: p for p in ("q_proj", "k_proj", "v_proj")} | {"o_proj": "out_proj"})
    )
    x = recording.leaf(f"in/{name}.x")
    q, k, v = mixer.project(x)
    mixed = mixer.attend(q, k, v, Masks(), None)
    # Shifted by ceil(G / 2) and back by floor(G / 2): with an odd G their outputs are one place too early.
    still, shifted = mixed.split([heads // 2, heads - heads // 2], dim=1)
    mixed = torch.cat((still, shifted.roll(group // 2 - -(-group // 2), dims=2)), dim=1)
    y = mixer.join(mixed, x, None)
    (y * recording[f"in/{name}.w"]).sum().backward()
    return {f"out/{name}.y": y, f"grad/{name}.x": x.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    """Every recorded configuration."""
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
