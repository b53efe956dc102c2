"""gCOG as a task: answer a rule on a grid, and generalise to more distractors, new combinations or deeper rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.tasks.contract import Batch, Budget, Split
from attnlab.tasks.gcog.rules import OPERATORS, Grid, Rule, encode_grid, encode_rule, evaluate, num_classes
from attnlab.tasks.gcog.sampling import ENDINGS, Family, draw_example
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.registry import tasks
from attnlab.tasks.scores import token_accuracy

SPLITS = ("none", "distractor", "systematic", "systematic_trees", "productive")
"""What evaluation is new in: nothing, distractors, pairs of operator and object, pairs of operators, depth."""

PUBLISHED: Mapping[str, Any] = {"side": 10, "features": 10, "max_distractors": 5, "test_distractors": 40}
"""The paper's grid; it tests 10, 20, 30 and 40 distractors."""

_WITHHELD = ("exist", "sumeven", "producteven", "getshape")
_FIRST = (("exist", "sumeven", "producteven"), ("sumeven", "producteven", "getcolor", "getshape"))
_SECOND = (("sumodd", "productodd"), ("exist", "sumodd", "productodd", "go"))


@tasks.register("gcog", family="reasoning", paper="gcog")
class Gcog(GeneratedTask):
    """What is a rule's answer on a grid of coloured shapes (Ito et al. 2024)?

    A rule asks whether an object exists, where it is, for its shape or colour, or for a parity of rows and columns; deeper rules
    go on with one of two others after a statement. The sequence is the rule, a row a node, and then the grid, a token a cell,
    with features in columns of their own. ``generalization`` makes both evaluation splits differ from training:

    ================  =============================================================================================
    distractor        ``test_distractors`` other objects instead of up to ``max_distractors``
    systematic        exist, sumeven, producteven and getshape about a fifth of the objects, which others train on
    systematic_trees  branches of depth 3 whose operators were trained on, but not one after the other
    productive        rules of depth 5 after those of depth 1 and 3
    ================  =============================================================================================

    Draw order: one integer from the torch generator seeds numpy's ``default_rng``; each example draws its number of distractors,
    its family where there are several, and then as `draw_example` says.

    Args:
        depth: of the rules, odd, where the split does not say it.
        side: rows and columns of the grid; published 10.
        features: shapes, and colours, in use; published 10.
        max_distractors: a uniform number up to it is there; published 5.
        test_distractors: those of the distractor split.
        generalization: one of `SPLITS`.
        binary: a column a value; otherwise ids as real numbers, as published.
        eval_examples: examples in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        ValueError: for sizes that do not fit.
    """

    kind = "reasoning"
    model = "encoder"
    metric = "accuracy"
    higher_is_better = True
    small: ClassVar[Mapping[str, Any]] = {"eval_examples": 60}

    def __init__(
        self,
        depth: int = 1,
        side: int = 3,
        features: int = 3,
        *,
        max_distractors: int = 3,
        test_distractors: int = 6,
        generalization: str = "none",
        binary: bool = True,
        eval_examples: int = 512,
        seed: int = 0,
    ) -> None:
        if generalization not in SPLITS:
            raise ValueError(f"generalization: expected one of {SPLITS}, got {generalization!r}")
        if depth < 1 or depth % 2 == 0:
            raise ValueError(f"depth: expected a positive odd integer, got {depth}")
        if not 2 <= features <= 10 or min(max_distractors, test_distractors) < 0:
            raise ValueError(
                f"features, distractors: expected 2 to 10 and no negative number, got {features}, {max_distractors}, "
                f"{test_distractors}"
            )
        deepest = 5 if generalization == "productive" else 3 if generalization == "systematic_trees" else depth
        self._nodes = 3 * 2 ** (deepest // 2) - 2
        if side**2 < 2 * self._nodes or (deepest > 1 and features**2 < 4 * self._nodes):
            raise ValueError(f"side, features: expected room for rules of depth {deepest}, got {side} and {features}")
        self.depth, self.side, self.features, self.binary = depth, side, features, binary
        self.max_distractors, self.test_distractors, self.generalization = max_distractors, test_distractors, generalization
        super().__init__(eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """An encoder over rule and grid with learned positions that answers at the token which ends the grid."""
        return {
            "num_classes": num_classes(self.side),
            "input": "patches",
            "pool": "last",
            "patch_dim": self._width(True) + self._width(False),
            "max_length": self._nodes + 1 + self.side**2 + 1,
        }

    @property
    def default_budget(self) -> Budget:
        """Some 20 seconds on one core."""
        return Budget(steps=1500, batch_size=32, learning_rates=(0.003, 0.005), parameters=40_000, depth=2, num_heads=4)

    def families(self, held_out: bool) -> tuple[Family, ...]:
        """The rules of training, or of evaluation; one family is drawn from for each example, all alike."""
        pairs = frozenset(
            (shape, colour)
            for shape in range(1, self.features + 1)
            for colour in range(1, self.features + 1)
            if (shape + 2 * colour) % 5 == 0
        )
        if self.generalization == "systematic":
            operators = _WITHHELD if held_out else ENDINGS
            return (Family((1,), operators, operators, pairs, _WITHHELD, held_out),)
        if self.generalization == "productive":
            return (Family((5,)),) if held_out else (Family((1, 3)),)
        if self.generalization == "systematic_trees":
            if held_out:
                return (Family((3,), _FIRST[0], _SECOND[1]), Family((3,), _SECOND[0], _FIRST[1]))
            return (Family((3,), *_FIRST), Family((3,), *_SECOND), Family((1,)))
        return (Family((self.depth,)),)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Examples as in training."""
        return self._batch(self._examples(count, generator, False))

    def draw_split(self, count: int, generator: torch.Generator, split: Split) -> Batch:
        """Examples that are new in what ``generalization`` says."""
        return self._batch(self._examples(count, generator, self.generalization != "none"))

    def _examples(self, count: int, generator: torch.Generator, held_out: bool) -> list[tuple[Rule, Grid]]:
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        families, found = self.families(held_out), []
        for _ in range(count):
            many = held_out and self.generalization == "distractor"
            distractors = self.test_distractors if many else int(rng.integers(self.max_distractors + 1))
            family = families[int(rng.integers(len(families)))] if len(families) > 1 else families[0]
            found.append(draw_example(family, distractors, self.side, self.features, rng))
        return found

    def _batch(self, examples: list[tuple[Rule, Grid]]) -> Batch:
        room = self._nodes + 1
        rules = np.zeros((len(examples), room, 8))
        mask = np.ones((len(examples), room + self.side**2 + 1), dtype=bool)
        grids = np.zeros((len(examples), self.side**2 + 1, 3))
        answers = np.zeros(len(examples), dtype=np.int64)
        for index, (rule, grid) in enumerate(examples):
            rows = encode_rule(rule)
            rules[index, : len(rows)], grids[index], answers[index] = rows, encode_grid(grid), evaluate(rule, grid)
            mask[index, len(rows) : room] = False
        first, second = self._features(rules, True), self._features(grids, False)
        inputs = np.zeros((*mask.shape, first.shape[-1] + second.shape[-1]))
        inputs[:, :room, : first.shape[-1]], inputs[:, room:, first.shape[-1] :] = first, second
        return Batch(torch.from_numpy(inputs).float(), torch.from_numpy(answers), torch.from_numpy(mask))

    def _sizes(self, rule: bool) -> list[int]:
        """Values that each number of a token has, 0 not counted."""
        objects = [self.features, self.features]
        return [len(OPERATORS), *objects, 1, *objects, 1, 1] if rule else [*objects, 1]

    def _width(self, rule: bool) -> int:
        return sum(self._sizes(rule)) if self.binary else len(self._sizes(rule))

    def _features(self, numbers: Float[np.ndarray, "b n k"], rule: bool) -> Float[np.ndarray, "b n f"]:
        if not self.binary:
            return numbers
        columns = [numbers[..., k, None] == np.arange(1, size + 1) for k, size in enumerate(self._sizes(rule))]
        return np.concatenate(columns, -1).astype(np.float64)

    def metrics(self, logits: Float[Tensor, "b k"], batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of right answers."""
        return token_accuracy(logits, batch)

    def _first_operators(self, batch: Batch) -> Tensor:
        first = batch.inputs[:, 0]
        return first[:, : len(OPERATORS)].argmax(-1) if self.binary else first[:, 0].long() - 1

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of the answer most frequent in other examples, and of the most frequent one for the rule's first operator."""
        batch = self.examples(split)
        others = self._batch(self._examples(1000, torch.Generator().manual_seed(4 * self.seed + 3), False))
        counts = torch.zeros(len(OPERATORS), num_classes(self.side))
        counts.index_put_((self._first_operators(others), others.targets), torch.ones(len(others)), accumulate=True)
        asked: Bool[Tensor, "b"] = counts[self._first_operators(batch)].argmax(-1) == batch.targets
        return {
            "majority": float((batch.targets == counts.sum(0).argmax()).float().mean()),
            "majority_of_operator": float(asked.float().mean()),
        }
