"""Flow attention, causal and not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill

PROVES = ("mixer:flow",)

_LAYERS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    weights = recording.parameters(f"{name}.")
    inner, width = weights["out_projection.weight"].shape[1], weights["query_projection.weight"].shape[1]
    dim = max(config["d_input"], config["d_output"])
    mixer = create_mixer("flow", dim, config["n_heads"], causal=name == "causal", head_dim=inner // config["n_heads"])
    values = {}
    for ours, theirs in _LAYERS.items():
        weight, bias = weights[f"{theirs}_projection.weight"], weights[f"{theirs}_projection.bias"]
        if ours == "out_proj":  # what the wider of input and output has more is zero, and cut off again
            weight, bias = F.pad(weight, (0, 0, 0, dim - weight.shape[0])), F.pad(bias, (0, dim - bias.shape[0]))
        else:
            weight = F.pad(weight, (0, dim - width))
        values |= {f"{ours}.weight": weight, f"{ours}.bias": bias}
    fill(mixer.to(recording.dtype), values)
    x = recording.leaf(f"in/{name}_queries")
    context = recording.get(f"in/{name}_keys_values")
    leaves = {f"{name}_queries": x}
    if context is not None:
        leaves[f"{name}_keys_values"] = context = context.clone().requires_grad_()
    padded = [None if t is None else F.pad(t, (0, dim - width)) for t in (x, context)]
    y = mixer(*padded)[..., : config["d_output"]]
    (y * recording[f"in/{name}_w"]).sum().backward()
    found = {f"out/{name}": y} | {f"grad/{key}": leaf.grad for key, leaf in leaves.items()}
    return {key: value for key, value in found.items() if key in recording}


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for name in ("normal", "causal"):
        if f"in/{name}_queries" in recording:
            results |= _run(recording, name, recording.config)
    return results
