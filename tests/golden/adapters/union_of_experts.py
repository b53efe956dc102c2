"""Selective multi-head attention of a union of experts (Yang et al. 2025), with the residual that the authors have inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer, record
from golden.recording import Recording, fill

PROVES = ("mixer:union_of_experts",)


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    weights, x = recording.parameters(f"{name}."), recording.leaf(f"in/{name}.x")
    dim, heads = config["dim"], config["heads_experts"]
    width = weights["W_q.weight.0"].shape[2]
    mixer = create_mixer("union_of_experts", dim, heads, head_dim=width, rank_causal=True).to(recording.dtype)
    rows = {"q_proj": ("W_q", slice(None)), "k_proj": ("W_kv", slice(0, width)), "v_proj": ("W_kv", slice(width, 2 * width))}
    mapped = {"gate.weight": weights["switch_gate.w_gate.weight"], "gate.bias": weights["switch_gate.w_gate.bias"]}
    for part, (theirs, cut) in rows.items():
        mapped[f"{part}.weight"] = weights[f"{theirs}.weight.0"][..., cut].transpose(1, 2).flatten(0, 1)
        mapped[f"{part}.bias"] = weights[f"{theirs}.bias.0"][..., cut].flatten()
    mapped["out_proj.weight"] = weights["ff.weight.0"].flatten(0, 1).T
    mapped["expert_bias"] = weights["ff.bias"]
    fill(mixer, mapped)
    with record(mixer, only=["route", "selected"]) as tape:
        with torch.no_grad():
            mixer(x)
        # which unrouted tokens fill up is what the authors' sort makes of equal zeros
        by_head = tape["route"].permute(0, 2, 1)
        length = int((by_head > 0).sum(-1).max())
        taken = torch.zeros_like(by_head, dtype=torch.bool).scatter(2, by_head.topk(length, -1).indices, True)
        mixer.hold(taken & (by_head == 0))
        y = x + mixer(x)
    if not config["pre_lnorm"]:
        y = F.layer_norm(y, (dim,), weights["layer_norm.weight"], weights["layer_norm.bias"])
    (y * recording[f"in/{name}.w"]).sum().backward()
    return {
        f"out/{name}.y": y,
        f"out/{name}.route": tape["route"],
        f"out/{name}.selected_len": tape["selected"].sum(-1).max(),
        f"grad/{name}.x": x.grad,
    }


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
