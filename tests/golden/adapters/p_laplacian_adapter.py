"""The p-adapter behind a self-attention and behind a cross-attention, from their maps and projections on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.mixers.graph.p_laplacian_adapter import PLaplacianUpdate
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
    adapter = PLaplacianUpdate(
        dim,
        heads,
        p=config["p"],
        learned_p=config["learnable_p"],
        mu=config["mu"],
        reduction=config["reduction"],
    ).to(recording.dtype)
    fill(adapter, renamed(weights, _NAMES))

    def project(tokens: Tensor) -> Tensor:
        return F.linear(tokens, weights["dense.weight"], weights["dense.bias"])

    context = recording.leaf(f"in/{name}.context")
    graph, nodes, queries = recording[f"in/{name}.adjacency"], recording[f"in/{name}.nodes"], None
    if keys:
        # The recorded graph has queries and keys in one matrix; what queries receive is its upper right block.
        start = graph.shape[-1] - keys
        assert torch.equal(graph[..., :start, :start], torch.zeros_like(graph[..., :start, :start]))
        graph, nodes, queries = graph[..., :start, start:], nodes[:, start:], project(nodes[:, :start])
    y = project(context)
    y = y + adapter(y, graph, project(nodes), queries)
    y = y + recording[f"in/{name}.residual"]
    eps = 1e-12  # of the frozen model's LayerNorm
    y = F.layer_norm(y, (dim,), weights["LayerNorm.weight"], weights["LayerNorm.bias"], eps)
    (y * recording[f"in/{name}.w"]).sum().backward()
    return {f"out/{name}.y": y, f"grad/{name}.context": context.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
