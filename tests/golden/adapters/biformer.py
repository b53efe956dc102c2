"""Bi-level routing attention of the released models."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from attnlab import create_mixer, record
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:bi_level_routing",)
LATER = ("backbone",)


def _options(text: str) -> dict[str, str]:
    """The keywords of the constructor's text."""
    return dict(re.findall(r"(\w+)=([^,()]+)", text))


def run(recording: Recording) -> dict[str, Tensor]:
    options = _options(recording.config["ctor"])
    weights, dim = recording.parameters(), int(options["dim"])
    qk_dim = int(options["qk_dim"]) if options.get("qk_dim", "None") != "None" else dim
    mixer = create_mixer(
        "bi_level_routing",
        dim,
        int(options["num_heads"]),
        num_regions=int(options["n_win"]),
        num_routed=int(options["topk"]),
        soft_routing=options.get("soft_routing", "False") == "True",
        qk_dim=qk_dim,
        lepe_kernel=int(options.get("side_dwconv", 3)),
        border="zero_tokens",
    ).to(recording.dtype)
    mapped = rows(weights, "qkv.qkv", {"q_proj": qk_dim, "k_proj": qk_dim, "v_proj": dim})
    fill(mixer, mapped | renamed(weights, {"wo": "out_proj", "lepe": "position.conv"}))
    x = recording.leaf("in/x")
    grid = tuple(x.shape[1:3])
    with record(mixer, only=["selection", "routing_weights"]) as tape:
        y = mixer(x.flatten(1, 2), grid=grid).unflatten(1, grid)
    (y * recording["in/w"]).sum().backward()
    results = {"out/y": y, "out/r_idx": tape["selection"], "out/r_weight": tape["routing_weights"], "grad/x": x.grad}
    if "out/attn" in recording:
        results["out/attn"] = _of_regions(mixer, x, grid, tape["selection"])
    return results


@torch.no_grad()
def _of_regions(mixer, x: Tensor, grid: tuple[int, int], chosen: Tensor) -> Tensor:
    """The map, (batch and region, head, query of the region, key of the chosen regions)."""
    matrix = mixer.mixing_matrix(x.flatten(1, 2), grid=grid)
    sides = mixer.regions(grid)
    cells = torch.arange(grid[0] * grid[1]).view(grid[0] // sides[0], sides[0], grid[1] // sides[1], sides[1])
    cells = cells.transpose(1, 2).flatten(0, 1).flatten(1)
    found = []
    for example, regions in zip(matrix, chosen, strict=True):
        for region, picked in enumerate(regions):
            found.append(example[:, cells[region]][:, :, cells[picked].flatten()])
    return torch.stack(found)
