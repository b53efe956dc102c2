"""The equivalence control: one function through two backends must tie, or no difference between mechanisms means anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn

from attnlab.compare.gate import Agreement, agreement
from attnlab.compare.plan import build_model, load_task
from attnlab.compare.statistics import pooled_deviation

BATCH = 4
"""Examples on which rounding is compared."""


def rounding(spec: Mapping[str, Any]) -> Agreement:
    """Logits and gradients of softmax attention's reference model, by the default backend and by the reference.

    Args:
        spec: of a "rounding" cell: task, mixer, budget.
    """
    task = load_task(spec["task"]["name"], spec["task"]["options"])
    batch = next(task.train_batches(BATCH, torch.Generator().manual_seed(0)))
    mixer = spec["mixer"]
    built = build_model(spec["task"]["name"], spec["task"]["options"], mixer["name"], mixer["options"], spec["budget"], seed=0)
    state = built.model.state_dict()

    def run(dtype: torch.dtype) -> tuple[Float[Tensor, "_"], Float[Tensor, "_"]]:
        model = cast(nn.Module, built.model).to(dtype).eval()
        model.load_state_dict(state)
        logits = batch.each(lambda value: value.to(dtype) if value.is_floating_point() else value).through(model)
        cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        gradients = torch.autograd.grad(logits, list(model.parameters()), cotangent, allow_unused=True)
        return logits.detach().flatten(), torch.cat([g.flatten() for g in gradients if g is not None])

    state = {name: value.clone() for name, value in state.items()}
    return agreement(run)


@dataclass(frozen=True)
class Tie:
    """The control's outcome on one task.

    The two runs share initial parameters and batches and differ in rounding, which training magnifies. They tie if the
    difference in the metric is no more than two runs of one mechanism differ by when only the seed differs: with the standard
    deviation s over seeds, pooled over the mechanisms of the task with f degrees of freedom, at most
    $\\sqrt{2}\\, s\\, t_{0.975, f}$, which such a pair exceeds in 5 % of cases; one evaluation example is always allowed.
    Without a second seed there is no s, and rounding alone decides.

    Args:
        task: its label.
        difference: of the metric on the validation split, default backend less reference; None if a run is missing.
        allowed: the limit; None without a second seed.
        rounding: whether both backends agree within rounding before training; None if that was not measured.
        distance: of the parameters after training, relative to their size: not 0, as the two do round differently.
    """

    task: str
    difference: float | None
    allowed: float | None
    rounding: bool | None
    distance: float | None = None

    @property
    def holds(self) -> bool | None:
        """True if it ties, False if it does not, None if it could not be decided."""
        if self.rounding is False:
            return False
        if self.rounding is None or self.difference is None:
            return None
        return self.allowed is None or abs(self.difference) <= self.allowed * (1 + 1e-9)


def judge(
    task: str,
    default: float | None,
    reference: float | None,
    seeds: Sequence[Sequence[float]],
    agrees: bool | None,
    *,
    resolution: float,
) -> Tie:
    """The control's outcome.

    Args:
        task: its label.
        default: validation metric of softmax at the first seed.
        reference: the same run through the reference backend.
        seeds: for each mechanism on the task its validation metrics over seeds at its chosen rate.
        agrees: the outcome of `rounding`.
        resolution: the smallest step of the metric: one evaluation example.
    """
    difference = None if default is None or reference is None else default - reference
    deviation, df = pooled_deviation(seeds)
    allowed = None if df == 0 else max(resolution, 2.0**0.5 * deviation * float(stats.t.ppf(0.975, df)))
    return Tie(task, difference, allowed, agrees)
