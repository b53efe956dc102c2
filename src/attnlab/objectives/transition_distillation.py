"""Transition distillation: what follows an item in the training sequences, taught to the item embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.objectives.contract import Objective
from attnlab.objectives.registry import objectives


def count_transitions(
    sequences: Int[Tensor, "b n"], num_items: int, *, mask: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, "v v"]:
    """How often item j directly follows item i, (items, items).

    Args:
        sequences: item ids (b, n), from 0 to ``num_items`` - 1 at real places.
        num_items: v.
        mask: (b, n), True marks a real item; masked places are skipped, wherever they are.

    Raises:
        ValueError: for an id out of range at a real place.
    """
    real = torch.ones_like(sequences, dtype=torch.bool) if mask is None else mask
    items = sequences[real]
    if items.numel() and (int(items.min()) < 0 or int(items.max()) >= num_items):
        raise ValueError(f"sequences: expected ids from 0 to {num_items - 1}, got {int(items.min())} to {int(items.max())}")
    example = torch.arange(len(sequences), device=sequences.device)[:, None].expand_as(sequences)[real]
    follows = example[1:] == example[:-1]
    pairs = (items[:-1] * num_items + items[1:])[follows]
    return torch.bincount(pairs, minlength=num_items**2).view(num_items, num_items).to(torch.float32)


@objectives.register("transition_distillation", paper="mqsa-ted")
class TransitionDistillation(Objective):
    r"""Cross-entropy of item embeddings against global transition counts (Zhu et al. 2023, TED).

    With embeddings $E \in \mathbb{R}^{V \times d}$ and counts $T_{ij}$ of j following i (`count_transitions`),

    $$\mathcal{L} = -\operatorname{mean}_i \sum_j \mathrm{softmax}_j\Big(\frac{T_{ij}}{\tau \max_j T_{ij}}\Big)
      \log \mathrm{softmax}_j\Big(\frac{\sqrt d\, e_i^\top e_j}{\tau}\Big)$$

    over the items that have a transition. The authors add 0.1 of it to the loss. It reads no map: hand it the embeddings,
    ``objective([model.embedding.weight])``, or what a model emits under "item_embeddings". Two tensors are those of the
    predicting items and of the predicted ones, so that the first may have had dropout, as the authors' have. Memory O(V^2).

    Args:
        counts: T, (V, V), not negative; kept as a buffer.
        temperature: $\tau$.

    Raises:
        ValueError: for counts that are not square or negative, a temperature that is not positive, embeddings of another
            number of items, or a mask that does not fit.

    Differs from the paper: items without any transition, whose counts have no maximum to divide by, are left out. A ``mask``
    (1, V) marks the items that count.
    """

    reads: ClassVar[str] = "item_embeddings"
    counts: Tensor

    def __init__(self, counts: Float[Tensor, "v v"], *, temperature: float | int = 0.1) -> None:
        super().__init__()
        if counts.dim() != 2 or counts.shape[0] != counts.shape[1] or bool((counts < 0).any()):
            raise ValueError(f"counts: expected a square matrix without negative entries, got shape {tuple(counts.shape)}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.register_buffer("counts", counts)
        self.temperature = temperature

    def measure(self, layers: Sequence[Tensor], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, ""]:
        """The mean over the items that count."""
        sources, items = layers[0], layers[-1]
        for embeddings in (sources, items):
            if embeddings.dim() != 2 or len(embeddings) != len(self.counts):
                raise ValueError(f"recorded: expected ({len(self.counts)}, d) embeddings, got {tuple(embeddings.shape)}")
        if len(layers) > 2:
            raise ValueError(f"recorded: expected embeddings once, or those of both sides, got {len(layers)} tensors")
        if mask is not None and tuple(mask.shape) != (1, len(self.counts)):
            raise ValueError(f"mask: expected shape {(1, len(self.counts))}, got {tuple(mask.shape)}")
        most = self.counts.amax(dim=1, keepdim=True)
        used = most.squeeze(1) > 0 if mask is None else (most.squeeze(1) > 0) & mask[0]
        labels = (self.counts / most.masked_fill(most == 0, 1.0) / self.temperature).softmax(dim=1).to(items.dtype)
        logits = sources @ items.T * (items.shape[1] ** 0.5 / self.temperature)
        losses = -(labels * logits.log_softmax(dim=1)).sum(dim=1)
        return losses.masked_fill(~used, 0.0).sum() / used.sum().clamp(min=1)
