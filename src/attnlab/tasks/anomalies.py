"""Anomalies in generated time series: is this stretch of a periodic signal as it should be?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.models.sampling import evaluating
from attnlab.tasks.contract import Batch, Budget, Split
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.registry import tasks
from attnlab.tasks.scores import token_accuracy

KINDS = ("spike", "shift", "flat", "frequency", "noise")
"""What happens in a stretch of an anomalous series, in the order in which a draw numbers it."""


@tasks.register("anomalies", family="classification")
class Anomalies(GeneratedTask):
    r"""Series of several channels, of which some have an anomalous stretch; the answer is whether one has.

    Channel c of a series is $a_c \sin(2\pi f t/n + \varphi_c) + \sigma\epsilon$ at n steps, with one frequency f of 2 to 5
    periods, amplitudes of 0.5 to 1.5 and phases of its own. In an anomalous series one channel changes for a stretch of
    ``length`` steps: a spike in its middle (+2), a shift of the level (+1), standing still, double the frequency, or noise of
    $4\sigma + 0.2$. ``patch`` steps of all channels are a token. Ranking scores (`ranking_scores`) do not depend on how rare
    anomalies are.

    A draw takes labels (one number each), frequencies, amplitudes, phases, noise, kinds, channels, beginnings, and more noise.

    Args:
        seq_len: n, steps.
        channels: values a step.
        length: steps of the stretch.
        patch: steps a token; divides n.
        share: of anomalous series.
        noise: $\sigma$.
        eval_examples: series in each evaluation split.
        seed: of the evaluation series.

    Raises:
        ValueError: for sizes out of range.
    """

    kind = "classification"
    model = "encoder"
    metric = "accuracy"
    higher_is_better = True
    small: ClassVar[Mapping[str, Any]] = {"eval_examples": 40}

    def __init__(
        self,
        seq_len: int = 48,
        channels: int = 3,
        length: int = 12,
        patch: int = 8,
        *,
        share: float = 0.5,
        noise: float = 0.05,
        eval_examples: int = 400,
        seed: int = 0,
    ) -> None:
        if patch < 1 or seq_len % patch:
            raise ValueError(f"patch: expected a positive divisor of seq_len={seq_len}, got {patch}")
        if channels < 1 or not 1 <= length <= seq_len or not 0.0 < share < 1.0 or noise < 0.0:
            raise ValueError(
                "seq_len, channels, length, share, noise: expected length <= seq_len, positive numbers and a share below 1, "
                f"got {seq_len}, {channels}, {length}, {share} and {noise}"
            )
        self.seq_len, self.channels, self.length, self.patch = seq_len, channels, length, patch
        self.share, self.noise = share, noise
        super().__init__(eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """An encoder over stretches of time with learned positions."""
        values, tokens = self.patch * self.channels, self.seq_len // self.patch
        return {"num_classes": 2, "input": "patches", "patch_dim": values, "max_length": tokens}

    @property
    def default_budget(self) -> Budget:
        """10 to 20 seconds on one core at the default sizes."""
        return Budget(steps=400, batch_size=64, learning_rates=(0.005, 0.01), parameters=40_000, depth=2, num_heads=4)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` new series."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator)

        labels = (uniform() < self.share).long()
        turns = 2 * torch.pi * (2.0 + 3.0 * uniform(1, 1)) * torch.arange(self.seq_len)[:, None] / self.seq_len
        amplitudes, phases = 0.5 + uniform(1, self.channels), 2 * torch.pi * uniform(1, self.channels)
        noise = self.noise * torch.randn(count, self.seq_len, self.channels, generator=generator)
        kinds = torch.randint(len(KINDS), (count,), generator=generator)
        channel = torch.randint(self.channels, (count,), generator=generator)
        begin = torch.randint(self.seq_len - self.length + 1, (count,), generator=generator)
        clean = amplitudes * torch.sin(turns + phases)
        steps = torch.arange(self.seq_len) - begin[:, None]
        inside = (steps >= 0) & (steps < self.length)
        still = clean.gather(1, begin[:, None, None].expand(-1, 1, self.channels)).expand_as(clean)
        spike = 2.0 * (steps == self.length // 2)[..., None]
        spread = (4.0 * self.noise + 0.2) * torch.randn(noise.shape, generator=generator)
        faulty = (
            clean + spike + noise,
            clean + 1.0 + noise,
            still,
            amplitudes * torch.sin(2.0 * turns + phases) + noise,
            clean + spread,
        )
        chosen = torch.stack(faulty)[kinds, torch.arange(count)]
        hit = inside[..., None] & (torch.arange(self.channels) == channel[:, None, None]) & labels.bool()[:, None, None]
        series = torch.where(hit, chosen, clean + noise)
        return Batch(series.view(count, self.seq_len // self.patch, -1), labels)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of series judged rightly."""
        return token_accuracy(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of the more frequent answer, and of the best threshold on the largest value, found on the same series."""
        batch = self.examples(split)
        anomalous = float(batch.targets.double().mean())
        order = batch.inputs.abs().amax((1, 2)).argsort(descending=True)
        found = batch.targets[order].cumsum(0) * 2 - torch.arange(1, len(order) + 1)
        normal = len(order) - int(batch.targets.sum())
        return {
            "majority": max(anomalous, 1.0 - anomalous),
            "largest_value": (normal + max(0, int(found.max()))) / len(order),
        }


def ranking_scores(model: nn.Module, task: Anomalies, split: Split = "valid") -> dict[str, float]:
    """Area under the ROC curve ("auroc") and average precision ("average_precision") of a model's anomaly score over a split.

    Args:
        model: an encoder with two classes; the score is the difference of their logits.
        task: whose evaluation series are ranked.
        split: "valid" or "test".

    Raises:
        ValueError: for a split without both kinds of series.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    device = next(model.parameters()).device
    scores: list[Float[Tensor, "b"]] = []
    with evaluating(model):
        for batch in task.eval_batches(64, split):
            logits = batch.to(device).through(model).double().cpu()
            scores.append(logits[:, 1] - logits[:, 0])
    labels, ranked = task.examples(split).targets.numpy(), torch.cat(scores).numpy()
    if labels.min() == labels.max():
        raise ValueError(f"task: expected normal and anomalous series in split {split!r}, got one kind")
    return {"auroc": float(roc_auc_score(labels, ranked)), "average_precision": float(average_precision_score(labels, ranked))}
