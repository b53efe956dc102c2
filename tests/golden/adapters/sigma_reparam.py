"""SigmaReparam of a linear layer and of a patch embedding, in evaluation and over several training steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnlab import apply_modifier
from golden.recording import Recording, fill

PROVES = ("modifier:sigma_reparam",)


def _layer(recording: Recording, name: str, config: dict) -> nn.Module:
    weight = recording[f"param/{name}.weight"]
    layer: nn.Module
    if name == "lin":
        layer = nn.Linear(config["i"], config["o"])
    else:
        layer = nn.Conv2d(*config["conv"])  # channels in and out, kernel, stride, padding
    apply_modifier(layer.to(recording.dtype), "sigma_reparam")
    part = "parametrizations.weight.0"
    values = {
        "parametrizations.weight.original": weight,
        "bias": recording[f"param/{name}.bias"],
        f"{part}.gamma": recording[f"param/{name}.sigma"],
        f"{part}.u": recording[f"param/{name}.spectral_normed_weight.u"],
        f"{part}.sigma": recording[f"param/{name}.spectral_normed_weight.spectral_norm"],
    }
    fill(layer, values)
    return layer


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for name in ("lin", "conv"):
        if f"in/{name}.x" not in recording:
            continue
        layer: Any = _layer(recording, name, recording.config)
        x = recording.leaf(f"in/{name}.x")
        y = layer.eval()(x)
        results[f"out/{name}.y_eval"] = y
        if f"in/{name}.w" not in recording:
            continue
        part, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original
        (y * recording[f"in/{name}.w"]).sum().backward()
        results |= {f"grad/{name}.x": x.grad, f"grad/{name}.weight": weight.grad, f"grad/{name}.sigma": part.gamma.grad[None]}
        with torch.no_grad():
            weight.add_(recording[f"in/{name}.dweight"])
        layer.train()
        for step in range(sum(key.startswith(f"out/{name}.u_train") for key in recording.tensors)):
            results[f"out/{name}.y_train{step}"] = layer(x)
            results[f"out/{name}.u_train{step}"] = part.u.clone()
            results[f"out/{name}.spectral_norm_train{step}"] = part.effective_norm[None]  # the norm of the weight in use
    return results
