"""The authors' varied-size window attention."""

from __future__ import annotations

import re

import torch
from einops import rearrange
from torch import Tensor

from attnlab import create_mixer
from attnlab.core.windows import Windows
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:varied_size_window",)


def _recorded_lattice(recording: Recording, windows: Windows) -> tuple[Tensor, Tensor]:
    """The authors' cells and offsets, which they round to float32: from -1 to 1 on the map, here in cells."""
    last = torch.tensor([n - 1 for n in reversed(windows.padded)])
    layout = "() xy i u j v -> (i j) (u v) xy"
    cells, around = (rearrange(recording[f"const/{name}"], layout) for name in ("base_coords", "coords"))
    return (cells + 1) * last / 2, around * last / 2


def run(recording: Recording) -> dict[str, Tensor]:
    dim, heads = map(int, re.match(r"VSAWindowAttention\((\d+),\s*(\d+)", recording.config["ctor"]).groups())
    window = int(re.search(r"window_size=(\d+)", recording.config["ctor"]).group(1))
    weights = recording.parameters()
    mixer = create_mixer(
        "varied_size_window",
        dim,
        heads,
        window=window,
        qkv_bias="qkv.bias" in weights,
        position="offset_table",
        position_options={"size": window},
    ).to(recording.dtype)
    values = rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim})
    names = {"proj": "out_proj", "sampling_offsets.2": "shift_proj", "sampling_scales.2": "scale_proj"}
    values |= renamed(weights, names) | {"position.table": weights["relative_position_bias_table"].T}
    fill(mixer, values)
    if "const/coords" in recording:
        mixer.lattice = lambda windows, device, dtype: _recorded_lattice(recording, windows)
    x = recording.leaf("in/x")
    grid = tuple(x.shape[2:])
    y = mixer(x.flatten(2).mT, grid=grid).mT.unflatten(-1, grid)
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "grad/x": x.grad}
