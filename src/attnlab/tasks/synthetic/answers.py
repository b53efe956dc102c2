"""What tasks with a few asked tokens share: their metrics, and guesses that read nothing or only what the context holds."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.tasks.contract import IGNORE, Batch
from attnlab.tasks.scores import Scores, token_accuracy


def answer_scores(logits: Float[Tensor, "b n k"], batch: Batch) -> Scores:
    """Accuracy and loss over asked tokens, and "answers", the share of examples in which every asked token is right."""
    wrong = (logits.argmax(-1) != batch.targets) & (batch.targets != IGNORE)
    return {**token_accuracy(logits, batch), "answers": (float((~wrong.any(-1)).sum()), float(len(batch)))}


def frequent(batch: Batch) -> float:
    """Accuracy of answering with the most frequent target of ``batch`` always."""
    asked = batch.targets[batch.targets != IGNORE]
    return float(asked.bincount().max()) / len(asked)


def in_context(batch: Batch, candidates: Bool[Tensor, "b n"]) -> float:
    """Accuracy of answering with one of the inputs marked as candidates, each as likely."""
    inputs: Int[Tensor, "b n"] = batch.inputs
    same = (batch.targets[:, :, None] == inputs[:, None]) & candidates[:, None]
    share = same.sum(-1) / candidates.sum(-1, keepdim=True)
    return float(share[batch.targets != IGNORE].mean())
