"""The in-context classification generator, and the two-layer network that was run on its sequences."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import attnlab
from attnlab.tasks.icl.mixture import Burst, Mixture, draw_sequences
from golden.recording import Recording, fill

PROVES = ("task:in_context_classification",)


def _network(recording: Recording, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Two heads without scaling, three rectified layers on the last token, a linear classifier."""
    weights, results, width = recording.parameters(), {}, x.shape[-1]
    layers = sorted({name.split(".")[0] for name in weights if name.startswith("attn")})
    for index, layer in enumerate(layers, 1):
        head = attnlab.create_mixer("softmax", width, 1, causal=True, out_bias=False, dtype=x.dtype)
        query, key, value = (weights[f"{layer}.{name}"] for name in "QKV")
        # this network's scores are not divided by the root of the width
        fill(
            head,
            {
                "q_proj.weight": query * width**0.5,
                "k_proj.weight": key,
                "v_proj.weight": value,
                "out_proj.weight": torch.eye(width, dtype=x.dtype),
            },
        )
        results[f"out/probs_layer{index}"] = head.mixing_matrix(x)[:, 0]
        x = x + head(x)
    last = x[:, -1]
    for index in range(3):
        last = F.relu(last @ weights[f"mlp{index}.weight"].T + weights[f"mlp{index}.bias"])
    logits = last @ weights["out.weight"].T
    return results | {"out/logits": logits, "out/loss": F.cross_entropy(logits, labels)}


def run(recording: Recording) -> dict[str, Tensor]:
    """Vectors and sequences from the seed; the network on them."""
    config = recording.config
    rng = np.random.RandomState(config["seed"])
    mixture = Mixture.drawn(config["K"], config["L"], config["D"], rng, float(config["alpha"]))
    burst = Burst(
        config["N"],
        config["Nmax"],
        config["B"],
        float(config["p_B"]),
        float(config["p_C"]),
        float(config["eps"]),
        config["flip"],
        config["no_repeats"],
    )
    drawn = draw_sequences(mixture, burst, config["S"], rng)
    found = {
        "mus_label": mixture.labels,
        "mus_class": mixture.classes,
        "labels_class": mixture.label_of,
        "inputs": drawn.inputs,
        "label_index": drawn.label,
        "target_class": drawn.target_class,
    }
    results = {f"out/{name}": torch.from_numpy(value) for name, value in found.items()}
    return results | _network(recording, results["out/inputs"].to(recording.dtype), results["out/label_index"])
