"""The selective scan as an op, and the Mamba block with its states."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.ops.selective_scan import selective_scan
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:mamba",)


def _tokens_first(x: Tensor, *, pairs: bool = False) -> Tensor:
    if pairs and x.dim() > 2 and not x.is_complex():  # real and imaginary parts beside each other along the tokens
        x = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return x.transpose(-1, -2) if x.dim() == 3 else x.permute(0, 3, 1, 2) if x.dim() == 4 else x


def _scan(recording: Recording, config: dict) -> dict[str, Tensor]:
    given = {name: recording.get(f"in/scan_{name}") for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")}
    leaves = {name: value.clone().requires_grad_() for name, value in given.items() if value is not None}
    pairs = leaves["A"].is_complex()
    by_token = {name: _tokens_first(leaf, pairs=pairs and name in ("B", "C")) for name, leaf in leaves.items()}
    y, state = selective_scan(**by_token, delta_softplus=config.get("delta_softplus", False))
    y = y.transpose(1, 2)
    results = {"out/scan_y": y, "out/scan_last_state": state}
    cotangent = recording.get("in/scan_w")
    if cotangent is not None:
        (y * cotangent).sum().backward()
        results |= {f"grad/scan_{name}": leaf.grad for name, leaf in leaves.items()}
    return {key: value for key, value in results.items() if key in recording}


def _module(recording: Recording, config: dict) -> dict[str, Tensor]:
    weights = recording.parameters()
    inner, rank = weights["dt_proj.weight"].shape
    mixer = create_mixer(
        "mamba",
        config["d_model"],
        state_dim=weights["A_log"].shape[1],
        expand=inner // config["d_model"],
        conv_size=weights["conv1d.weight"].shape[-1],
        dt_rank=rank,
        conv_bias="conv1d.bias" in weights,
        bias="in_proj.bias" in weights,
    ).to(recording.dtype)
    names = {"in_proj": "in_proj", "conv1d": "conv", "out_proj": "out_proj"}
    names |= {name: f"ssm.{name}" for name in ("x_proj", "dt_proj", "A_log", "D")}
    fill(mixer, renamed(weights, names))
    x = recording.leaf("in/x")
    y = mixer(x)
    (y * recording["in/w"]).sum().backward()
    results = {"out/y": y, "grad/x": x.grad}
    _, state = mixer.extend(x.detach(), mixer.init_state(x.shape[0]))
    results["out/final_ssm_state"] = state["ssm"]
    if "out/final_conv_state" in recording:
        # the authors keep the last d_conv inputs, the oldest of which no later output reads
        window = recording["out/final_conv_state"].clone()
        window[..., 1:] = state["window"].transpose(1, 2)
        results["out/final_conv_state"] = window
    return {key: value for key, value in results.items() if key in recording}


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    if "in/scan_u" in recording:
        results |= _scan(recording, recording.config.get("scan", {}))
    if "in/x" in recording:
        results |= _module(recording, recording.config["module"])
    return results
