"""The authors' neighbourhood attention module with a relative bias, dilated or not."""

from __future__ import annotations

from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:neighborhood",)


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    weights, dim = recording.parameters(f"{name}."), config["dim"]
    x = recording.leaf(f"in/{name}.x")
    grid = tuple(x.shape[1:-1])
    mixer = create_mixer(
        "neighborhood",
        dim,
        config["num_heads"],
        window=config["kernel_size"],
        dilation=config.get("dilation", 1),
        relative_bias="rpb" in weights,
        rank=len(grid),
        short_axes="zero_tokens",
        qkv_bias="qkv.bias" in weights,
    ).to(recording.dtype)
    mapped = rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim})
    fill(mixer, mapped | renamed(weights, {"rpb": "table", "proj": "out_proj"}))
    y = mixer(x.flatten(1, -2), grid=grid).unflatten(1, grid)
    (y * recording[f"in/{name}.w"]).sum().backward()
    results = {f"out/{name}.y": y, f"grad/{name}.x": x.grad}
    if f"grad/{name}.rpb" in recording and mixer.table is not None:
        results[f"grad/{name}.rpb"] = mixer.table.grad
    return results


def run(recording: Recording) -> dict[str, Tensor]:
    """Every recorded configuration."""
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
