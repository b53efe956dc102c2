"""HMT's recall from the queue of segment memories, its retrieval loss, and how far back it looked."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.models.memory_recall import MemoryRecall, recalled_age, retrieval_loss
from golden.recording import Recording, fill, renamed

PROVES = ("model:hmt",)


def run(recording: Recording) -> dict[str, Tensor]:
    weights = recording.parameters()
    hidden, dim = weights["wq.weight"].shape
    recall = MemoryRecall(dim, hidden).to(recording.dtype)
    fill(recall, renamed(weights, {"wq": "q_proj", "wk": "k_proj"}))
    query, memory = recording.leaf("in/query"), recording.leaf("in/memory")
    y = recall(query, memory)
    results = {"out/y": y}
    found = recall.weights(query, memory)
    if "in/pos_mask" in recording:
        # the authors hand weights that went through the softmax to a cross-entropy, which applies another
        results["out/retrieval_loss"] = retrieval_loss(found, recording["in/pos_mask"][:, None], twice=True)
    results["out/hist"] = recalled_age(found)[:, 0]
    if "in/w" in recording:
        (y * recording["in/w"]).sum().backward()
        results |= {"grad/query": query.grad, "grad/memory": memory.grad}
        grads = {"wq.weight": recall.q_proj.weight.grad, "wk.weight": recall.k_proj.weight.grad}
        results |= {f"grad/{name}": grad for name, grad in grads.items() if grad is not None}
    return {key: value for key, value in results.items() if isinstance(value, torch.Tensor) and key in recording}
