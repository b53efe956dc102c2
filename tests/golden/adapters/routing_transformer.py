"""Attention inside clusters: the public PyTorch port, and a transcription of the authors' code (names with ``tf_``)."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording

PROVES = ("mixer:routing_kmeans",)


def _authors(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    heads, width, shared = config["H"], config["D"], config.get("share_qk", False)
    mixer = create_mixer(
        "routing_kmeans",
        heads * width,
        heads,
        num_clusters=config["clusters"],
        window=config["window"],
        shared_qk=shared,
        hide_later=config.get("causal", False),
        decay=0.99,
    ).to(recording.dtype)
    means = mixer.centroids
    with torch.no_grad():
        means.means.copy_(recording[f"param/{name}.means"])
        means.counts.copy_(recording[f"param/{name}.ema_count"])
        means.sums.copy_(recording[f"param/{name}.ema_means"])
    q, k, v = (recording.leaf(f"in/{name}.{part}") for part in "qkv")
    used_q, used_k, members, routing = mixer._routed(q, q if shared else k, None)
    out = mixer.inside(used_q, used_k, v, members, None)
    (out * recording[f"in/{name}.w"]).sum().backward()
    loss = mixer.commitment(routing * 2 if shared else routing, None)
    mixer.learn(routing[:1], None)
    results = {f"out/{name}.out": out, f"out/{name}.loss": loss}
    results |= {f"out/{name}.{which}_index": getattr(members, long) for which, long in (("q", "queries"), ("k", "keys"))}
    results |= {
        f"out/{name}.updated_ema_count": means.counts,
        f"out/{name}.updated_ema_means": means.sums,
        f"out/{name}.updated_means": means.means,
    }
    gradients = {f"grad/{name}.{part}": x.grad for part, x in zip("qkv", (q, k, v), strict=True)}
    return results | {key: value for key, value in gradients.items() if key in recording}


def _port(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    heads, width = config["num_heads"], config["head_dim"]
    memory = recording[f"param/{name}.mem_key"].shape[2]
    mixer = create_mixer(
        "routing_kmeans",
        heads * width,
        heads,
        num_clusters=config["num_clusters"],
        window=config["window_size"],
        form="port",
        shared_qk=config.get("shared_qk", False),
        num_memory=memory,
        hide_later=config.get("causal", False),
    ).to(recording.dtype)
    with torch.no_grad():
        mixer.centroids.means.copy_(recording[f"param/{name}.kmeans.means"])
        if memory:
            mixer.memory_keys.copy_(recording[f"param/{name}.mem_key"])
            mixer.memory_values.copy_(recording[f"param/{name}.mem_value"])
    q, k, v = (recording.leaf(f"in/{name}.{part}") for part in "qkv")
    mask = recording.get(f"in/{name}.query_mask")
    # theirs have padded tokens among the best of a cluster, and in the centroids
    used_q, used_k, members, routing = mixer._routed(q, k, None)
    values = mixer.memory_values if memory else None
    out = mixer.inside(used_q, used_k, v, members, mask, values)
    if mask is not None:
        # and a padded query is given the mean of all, padded or not
        even = mixer.inside(torch.zeros_like(used_q), used_k, v, members, None, values)
        out = torch.where(mask[:, None, :, None], out, even)
    (out * recording[f"in/{name}.w"]).sum().backward()
    results = {f"out/{name}.out": out, f"out/{name}.aux_loss": mixer.commitment(routing, None)}
    results |= {f"grad/{name}.{part}": x.grad for part, x in zip("qkv", (q, k, v), strict=True)}
    mixer.learn(routing, None)
    results[f"out/{name}.means_after_update"] = mixer.centroids.means.clone()
    mixer.centroids.decay = 0.0
    with torch.no_grad():
        mixer.centroids.means.copy_(recording[f"param/{name}.kmeans.means"])
    mixer.learn(routing, None)
    return results | {f"out/{name}.new_means": mixer.centroids.means}


def run(recording: Recording) -> dict[str, Tensor]:
    """Every recorded configuration."""
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= (_authors if name.startswith("tf_") else _port)(recording, name, config)
    return results
