"""Mixture of heads around dot-product attention (DiT) and around TransNeXt's cosine attention (ViT)."""

from __future__ import annotations

from torch import Tensor

from attnlab import create_mixer, record
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:moh", "position:log_cpb")


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    dim, heads, shared, active = config["dim"], config["num_heads"], config["shared_head"], config["routed_head"]
    weights = recording.parameters(f"{name}.")
    cosine = config["kind"] == "vit"
    mixer = create_mixer(
        "moh",
        dim,
        heads,
        num_shared=shared,
        num_active=active,
        score="cosine" if cosine else "dot",
        position="log_cpb" if cosine else "none",
        qkv_bias="qkv.bias" in weights,
        qk_norm="layer_norm" if "q_norm.weight" in weights else "none",
    ).to(recording.dtype)
    mapped = rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim})
    mapped |= renamed(
        weights,
        {
            "proj": "out_proj",
            "wg": "linear_router.routed",
            "wg_0": "linear_router.balance",
            "wg_1": "linear_router.shared",
            "q_norm": "q_norm",
            "k_norm": "k_norm",
            "temperature": "cosine.temperature",
            "query_embedding": "cosine.query_embedding",
            "cpb_fc1": "position.fc1",
            "cpb_fc2": "position.fc2",
        },
    )
    fill(mixer, mapped)
    x = recording.leaf(f"in/{name}.x")
    if cosine:
        index = recording[f"in/{name}.relative_pos_index"].view(x.shape[1], x.shape[1])
        mixer.position.tabulate(recording[f"in/{name}.relative_coords_table"], index)
    with record(mixer, only=["balance_loss"]) as tape:
        y = mixer(x, grid=tuple(config["hw"]))
    (y * recording[f"in/{name}.w"]).sum().backward()
    results = {f"out/{name}.y": y, f"grad/{name}.x": x.grad}
    if f"out/{name}.aux_loss" in recording:
        results[f"out/{name}.aux_loss"] = tape["balance_loss"] if "balance_loss" in tape else y.new_zeros(())
    return results


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
