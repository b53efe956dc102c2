"""Key-driven, dynamic and perturbed grouped queries, plain ones, and the pooling of heads (Khan et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer, record
from attnlab.mixers.heads.grouping import to_grouped
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:key_driven_gqa", "mixer:dynamic_gqa", "mixer:softmax")
_NAMES = {"GQA": "softmax", "KDGQA": "key_driven_gqa", "DGQA": "dynamic_gqa", "PGQA": "perturbed_gqa"}
_PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "out_proj"}


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    cls, groups = config["cls"], config.get("num_kv_heads") or config["num_heads"] // 2
    options = {"kind": config.get("kind", "diff")} if cls == "DGQA" else {}
    mixer = create_mixer(
        _NAMES[cls], config["dim"], config["num_heads"], num_kv_heads=groups, qkv_bias=config.get("qkv_bias", False), **options
    )
    mixer = mixer.to(recording.dtype).eval()
    weights = recording.parameters(f"{name}.")
    kept = {key: value for key, value in mixer.state_dict().items() if "." not in key}
    fill(mixer, kept | renamed(weights, _PARTS))
    if cls == "DGQA":
        mixer.statistic.copy_(weights["cache"])
        drawn = recording.get(f"in/{name}.tiebreak")
        if drawn is not None and len(drawn):
            mixer.tiebreak = drawn.long()
    x = recording.leaf(f"in/{name}.x")
    if cls == "PGQA":
        rows = torch.cat([recording[f"in/{name}.rand{j}"] for j in range(groups)])
        per_group = config["num_heads"] // groups
        diagonal = torch.arange(len(rows)) % per_group
        mixer.hold(rows.scatter(1, diagonal[:, None], 0.0).reshape(len(rows), x.shape[1], -1))
    with record(mixer, only=["key_heads", "key_norms"]) as tape:
        y = mixer(x)
    (y * recording[f"in/{name}.w"]).sum().backward()
    results = {f"out/{name}.y": y, f"grad/{name}.x": x.grad}
    if f"out/{name}.splits" in recording:
        results[f"out/{name}.splits"] = torch.bincount(tape["key_heads"], minlength=groups)
    if f"out/{name}.cache" in recording:
        # the authors' evaluation stores the norms of the batch, ours hands them to whoever records
        results[f"out/{name}.cache"] = tape["key_norms"]
    return results


def _convert(recording: Recording, config: dict) -> dict[str, Tensor]:
    weight, bias = recording["in/conv.qkv_weight"], recording.get("in/conv.qkv_bias")
    plain = create_mixer("softmax", weight.shape[1], config["num_heads"], qkv_bias=bias is not None).to(recording.dtype)
    with torch.no_grad():
        for layer, part in zip((plain.q_proj, plain.k_proj, plain.v_proj), weight.chunk(3), strict=True):
            layer.weight.copy_(part)
        if bias is not None:
            for layer, part in zip((plain.q_proj, plain.k_proj, plain.v_proj), bias.chunk(3), strict=True):
                layer.bias.copy_(part)
    grouped = to_grouped(plain, config["num_kv_heads"])
    state = grouped.state_dict()
    return {
        f"out/conv.{p}_{kind}": state[f"{p}_proj.{kind}"]
        for p in "qkv"
        for kind in ("weight", "bias")
        if f"out/conv.{p}_{kind}" in recording
    }


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        if "cls" in config:
            results |= _run(recording, name, config)
    if "in/conv.qkv_weight" in recording:
        # meta.json: 4 heads and 2 groups, unless a case says otherwise
        results |= _convert(recording, recording.config.get("conv", {"num_heads": 4, "num_kv_heads": 2}))
    return results
