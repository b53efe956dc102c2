"""The p-adapter behind a self-attention and behind a cross-attention, from their maps and projections on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from attnlab.core.masks import Masks
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:p_laplacian_adapter",)

_NAMES = {
    "text_laplacian_adapter_i": "down",
    "text_laplacian_adapter_gate": "gate",
    "text_laplacian_adapter_o": "up",
    "laplacian_adapter_mu": "mu_shift",
    "laplacian_adapter_p": "p",
}


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    dim, heads, keys = config["dim"], config["heads"], config["Nk"]
    weights = recording.parameters(f"{name}.")
    mixer = create_mixer(
        "p_laplacian_adapter",
        dim,
        heads,
        p=config["p"],
        learned_p=config["learnable_p"],
        mu=config["mu"],
        reduction=config["reduction"],
        graph="bipartite" if keys else "self",
    ).to(recording.dtype)
    fill(mixer.out_proj, {kind: weights[f"dense.{kind}"] for kind in ("weight", "bias")})
    fill(mixer.adapter, renamed(weights, _NAMES))
    context = recording.leaf(f"in/{name}.context")
    graph = recording[f"in/{name}.adjacency"]
    nodes = recording[f"in/{name}.nodes"].unflatten(-1, (heads, -1)).transpose(1, 2)
    q = v = nodes
    if keys:
        # The recorded graph has queries and keys in one matrix; what queries receive is its upper right block.
        start = graph.shape[-1] - keys
        assert torch.equal(graph[..., :start, :start], torch.zeros_like(graph[..., :start, :start]))
        graph, q, v = graph[..., :start, start:], nodes[:, :, :start], nodes[:, :, start:]
    # What was recorded begins behind the map, and ends with the residual and the frozen model's LayerNorm.
    y = mixer.out_proj(context)
    y = y + mixer.update(context, y, graph, q, v, Masks()) + recording[f"in/{name}.residual"]
    y = F.layer_norm(y, (dim,), weights["LayerNorm.weight"], weights["LayerNorm.bias"], 1e-12)
    (y * recording[f"in/{name}.w"]).sum().backward()
    return {f"out/{name}.y": y, f"grad/{name}.context": context.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
