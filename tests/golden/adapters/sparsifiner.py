"""Sparsifiner's attention with its mask predictor, by budget and by threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer, record
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:sparsifiner",)


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    dim, options, weights = config["dim"], config.get("options", {}), recording.parameters(f"{name}.")
    mixer = create_mixer(
        "sparsifiner",
        dim,
        config["num_heads"],
        num_tokens=config["num_tokens"],
        class_token=True,
        keep_rate=config.get("attn_keep_rate", 0.25),
        score_threshold=options.get("thr") or None,
        reduce_tokens=config.get("reduce_n_factor", 8),
        reduce_dim=config.get("reduce_c_factor", 2),
        coef_threshold=options.get("bct", 0.0),
        coef_top_k=options.get("ctopk") or None,
        basis_threshold=options.get("bt", 0.0),
        qkv_bias="qkv.bias" in weights,
        shared_basis="mask_predictor.proj_back_n" not in weights,
    ).to(recording.dtype)
    mapped = rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim}) | renamed(weights, {"proj": "out_proj"})
    names = {"proj_c_q": "q_proj", "proj_c_k": "k_proj", "proj_n": "down", "proj_back_n": "up"}
    mapped |= renamed(weights, {f"mask_predictor.{old}": f"predictor.{new}" for old, new in names.items()})
    if "predictor.up" not in mapped:
        mapped["predictor.up"] = mapped["predictor.down"]
    fill(mixer, mapped)
    x = recording.leaf(f"in/{name}.x")
    with record(mixer, only=["selection"]) as tape:
        y = mixer(x)
    (y * recording[f"in/{name}.w"]).sum().backward()
    with torch.no_grad():
        q, k, _ = mixer.project(x)
        coefficients = mixer.predictor.pruned(mixer.predictor.coefficients(q, k, None))
        scores = mixer.predictor.scores(coefficients)
    return {
        f"out/{name}.y": y,
        f"out/{name}.mask": tape["selection"],
        f"out/{name}.basis_coef": coefficients[:, :, 1:],
        f"out/{name}.approx_attn": scores[:, :, 1:],
        f"grad/{name}.x": x.grad,
    }


def run(recording: Recording) -> dict[str, Tensor]:
    """Every recorded configuration."""
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
