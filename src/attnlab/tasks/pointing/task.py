"""Pointing: a sequence of positions of the input is the answer (Vinyals et al. 2015)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.core.errors import UnknownNameError, nearest
from attnlab.tasks.contract import IGNORE, Batch, Budget, Split
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.pointing.problems import PROBLEMS
from attnlab.tasks.registry import tasks
from attnlab.tasks.scores import token_accuracy

PUBLISHED: dict[str, dict[str, Any]] = {
    **{f"convex_hull_{n}": {"problem": "convex_hull", "num_points": n} for n in (5, 10, 50)},
    "convex_hull_5_50": {"problem": "convex_hull", "num_points": 50, "min_points": 5},
    **{f"delaunay_{n}": {"problem": "delaunay", "num_points": n} for n in (5, 10, 50)},
    **{f"tsp_{n}": {"problem": "tsp", "num_points": n} for n in (5, 10)},
}
"""Options of the paper's settings, by name; its tours of more cities have answers of heuristics, which are not here."""


@tasks.register("pointing", family="pointing", paper="pointer-networks")
class Pointing(GeneratedTask):
    r"""Points of the unit interval or square; the answer is a sequence of their positions (Vinyals et al. 2015, section 3).

    ===========  ==================================================================================================
    sorting      numbers in rising order (Vinyals et al. 2016)
    convex_hull  the hull's vertices, counter-clockwise from the one that comes first in the input
    delaunay     the triangles' corners, each triple rising, the triples by x and then y of their incentres
    tsp          the shortest tour from the first city; of its two directions that whose second city comes sooner
    ===========  ==================================================================================================

    Answers are exact: SciPy's Qhull, and Held and Karp's dynamic programme. Then comes the end, which for a tour is the way back.
    Point j is answer j + 1, and 0 is the end. A batch holds the points as context, the answers before as inputs (0 at first)
    and the answers as targets; steps after the end are masked.

    Each draw takes the numbers of points, where they vary, and then the points, those beyond an example's number too.

    Args:
        problem: "sorting", "convex_hull", "delaunay" or "tsp".
        num_points: n; for tours at most 13.
        min_points: examples have this many to ``num_points``, each number as likely; None for ``num_points`` always.
        eval_examples: examples in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        UnknownNameError: for an unknown problem.
        ValueError: for numbers of points for which the problem is not defined.
    """

    kind = "pointing"
    model = "pointer"
    metric = "accuracy"
    higher_is_better = True
    small: ClassVar[Mapping[str, Any]] = {"eval_examples": 20, "min_points": 4}

    def __init__(
        self,
        problem: str = "convex_hull",
        num_points: int = 6,
        min_points: int | None = None,
        *,
        eval_examples: int = 256,
        seed: int = 0,
    ) -> None:
        if problem not in PROBLEMS:
            raise UnknownNameError(f"problem: expected one of {tuple(PROBLEMS)}, got {problem!r}{nearest(problem, PROBLEMS)}")
        self.name, self.problem = problem, PROBLEMS[problem]
        self.num_points, self.min_points = num_points, num_points if min_points is None else min_points
        least, most = self.problem.least, self.problem.most
        if not least <= self.min_points <= num_points or (most is not None and num_points > most):
            upper = "" if most is None else f" <= {most}"
            raise ValueError(
                f"num_points, min_points: expected {least} <= min_points <= num_points{upper} for {problem!r}, "
                f"got {num_points} and {min_points}"
            )
        super().__init__(eval_examples, seed)

    @property
    def num_steps(self) -> int:
        """Steps of a batch: the most answers that there can be, and the end."""
        return self.problem.most_answers(self.num_points) + 1

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A pointer network over points, which it must be able to tell in order for all problems but sorting."""
        position = "none" if self.name == "sorting" else "learned"
        return {"input_dim": self.problem.dim, "max_length": self.num_points, "position": position}

    @property
    def default_budget(self) -> Budget:
        """10 to 20 seconds on one core at the default sizes."""
        return Budget(steps=400, batch_size=64, learning_rates=(0.005, 0.01), parameters=60_000, depth=2, num_heads=4)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` new examples with their exact answers."""
        sizes = torch.full((count,), self.num_points)
        if self.min_points < self.num_points:
            sizes = torch.randint(self.min_points, self.num_points + 1, (count,), generator=generator)
        points = torch.rand(count, self.num_points, self.problem.dim, generator=generator)
        targets = torch.full((count, self.num_steps), IGNORE)
        for size in sizes.unique().tolist():
            rows = (sizes == size).nonzero()[:, 0]
            for row, answers in zip(rows.tolist(), self.problem.solve(_exact(points[rows, :size])), strict=True):
                targets[row, : len(answers) + 1] = torch.tensor([*(one + 1 for one in answers), 0])
        asked = targets != IGNORE
        before = torch.cat((torch.zeros(count, 1, dtype=torch.int64), targets[:, :-1]), 1)
        real = None
        if self.min_points < self.num_points:
            real = torch.arange(self.num_points) < sizes[:, None]
            points = points.masked_fill(~real[..., None], 0.0)
        return Batch(before.masked_fill(~asked, 0), targets, asked, points, real)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of answers that are right, given the right ones before; "sequences": of examples in which all are."""
        wrong = (logits.argmax(-1) != batch.targets) & (batch.targets != IGNORE)
        return {**token_accuracy(logits, batch), "sequences": (float((~wrong.any(1)).sum()), float(len(batch)))}

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of guessing among all answers, among those that the rules allow, and of each step's most frequent answer."""
        batch = self.examples(split)
        targets, asked = batch.targets, batch.targets != IGNORE
        sizes = [self.num_points] * len(batch) if batch.context_mask is None else batch.context_mask.sum(1).tolist()
        allowed: list[float] = []
        for row, size in zip(answers_of(targets), sizes, strict=True):
            allowed += [1.0 / self.problem.choices(size, row[:step]) for step in range(len(row) + 1)]
        frequent = [int(one[taken].bincount().max()) for one, taken in zip(targets.T, asked.T, strict=True) if taken.any()]
        lengths = asked.sum(1).double()
        return {
            "any_answer": float((lengths / (torch.tensor(sizes) + 1)).sum() / lengths.sum()),
            "rules": sum(allowed) / len(allowed),
            "frequent": sum(frequent) / float(asked.sum()),
        }


def answers_of(sequences: Int[Tensor, "b m"]) -> list[list[int]]:
    """The positions, from 0, that each sequence of answers has before its end."""
    found = []
    for row in sequences.tolist():
        stop = next((step for step, answer in enumerate(row) if answer <= 0), len(row))
        found.append([answer - 1 for answer in row[:stop]])
    return found


def _exact(points: Float[Tensor, "b n d"]) -> Float[np.ndarray, "b n d"]:
    return points.double().numpy()
