"""NATTEN's recordings of its operators: heads last, a grid of any rank."""

from __future__ import annotations

from torch import Tensor

from attnlab.ops.tile_attention.neighborhood import axes_of, neighborhood_attention, neighborhood_mask
from golden.recording import Recording

RULES = {"kernel_size": "window", "stride": "stride", "dilation": "dilation", "is_causal": "causal"}


def run_operator(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    """One configuration: output, log-sum-exp, mask and gradients, those that were recorded."""
    rules = {ours: config[theirs] for theirs, ours in RULES.items() if theirs in config}
    leaves = {key: recording.leaf(f"in/{name}.{key}") for key in "qkv"}
    grid = leaves["q"].shape[1:-2]
    tokens = {key: leaf.flatten(1, -3).transpose(1, 2) for key, leaf in leaves.items()}
    output, lse = neighborhood_attention(**tokens, grid=grid, scale=config.get("scale"), **rules)
    output = output.transpose(1, 2).unflatten(1, grid)
    (output * recording[f"in/{name}.w"]).sum().backward()
    results = {f"out/{name}.out": output, f"out/{name}.lse": lse.transpose(1, 2).unflatten(1, grid)}
    results[f"out/{name}.mask"] = neighborhood_mask(axes_of(grid, **rules))
    return {key: value for key, value in results.items() if key in recording} | {
        f"grad/{name}.{key}": leaf.grad for key, leaf in leaves.items() if f"grad/{name}.{key}" in recording
    }
