"""What is still to be done: the cells of a suite, as far as the results so far decide them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from attnlab.compare.cells import Cell, Member, Role, canonical, code_version
from attnlab.compare.layers import can_be_causal
from attnlab.compare.ledger import Row
from attnlab.compare.suites import REFERENCE, MixerChoice, Suite, TaskChoice
from attnlab.core.catalog import mixer_info, mixers
from attnlab.core.errors import UnsupportedError
from attnlab.core.plugins import foreign_source
from attnlab.tasks import Budget, Task, create_task, reference_model

SWEEP_SEED = 0
SHARES = {"accuracy"}
"""Metrics that are shares of examples."""


@functools.lru_cache(maxsize=8)
def _task(name: str, options: str) -> Task:
    return create_task(name, **json.loads(options))


def load_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task, kept for later calls: loading data takes longer than a small run."""
    return _task(name, canonical(options))


@dataclass(frozen=True)
class Exclusion:
    """A mixer that a task's model cannot take, and why."""

    task: str
    mixer: str
    reason: str


@dataclass(frozen=True)
class PlannedTask:
    """A task of a suite with what is known before training; the fields are those that a report needs.

    Args:
        label: the suite's label.
        name: as it is registered.
        options: its own options.
        fingerprint: of its data.
        summary: one line.
        kind: of task, as `attnlab.tasks.contract.Kind` lists them.
        metric: what ranks.
        higher_is_better: its direction.
        budget: `attnlab.tasks.Budget` as a mapping; the learning rates are the sweep's.
        baselines: for each split, trivial baselines in the metric.
        split_examples: examples of the test split.
    """

    label: str
    name: str
    options: dict[str, Any]
    fingerprint: str
    summary: str
    kind: str
    metric: str
    higher_is_better: bool
    budget: dict[str, Any]
    baselines: dict[str, dict[str, float]]
    split_examples: int

    @property
    def resolution(self) -> float:
        """The step in which the metric comes on the test split: one example where it is a share of them, else none."""
        return 1.0 / self.split_examples if self.metric in SHARES else 0.0

    def better(self, a: float, b: float) -> bool:
        """Whether the metric's value a is better than b."""
        return a > b if self.higher_is_better else a < b


def plan_task(suite: Suite, choice: TaskChoice) -> PlannedTask:
    """Load a task and settle its budget."""
    task = load_task(choice.name, choice.options)
    matched = {} if suite.match is None else {"match": suite.match}
    budget: Budget = replace(task.default_budget, **{**matched, **choice.budget})
    rates = suite.learning_rates or tuple(float(rate) for rate in budget.learning_rates)
    count = sum(len(batch) for batch in task.eval_batches(256, "test"))
    return PlannedTask(
        choice.label,
        choice.name,
        dict(choice.options),
        task.fingerprint(),
        task.info.summary,
        task.kind,
        task.metric,
        task.higher_is_better,
        {**asdict(budget), "learning_rates": list(rates)},
        {split: task.baselines(split) for split in ("valid", "test")},
        count,
    )


class Plan:
    """A suite, prepared: which pairs of task and mixer there are, and which cells follow from which results.

    Args:
        suite: what is compared.
        machine: facts that identify the machine in timing cells.
    """

    def __init__(self, suite: Suite, machine: Mapping[str, Any]) -> None:
        self.suite = suite
        self.machine = {key: machine[key] for key in ("cpu", "cores")}
        self.tasks = {choice.label: plan_task(suite, choice) for choice in suite.tasks}
        self.exclusions: list[Exclusion] = []
        self.pairs: list[tuple[PlannedTask, MixerChoice]] = []
        for choice in suite.tasks:
            task = self.tasks[choice.label]
            for mixer in suite.mixers:
                own = replace(mixer, options={**mixer.options, **choice.mixer_options.get(mixer.label, {})})
                reason = why_not(task, own)
                if reason is None:
                    self.pairs.append((task, own))
                else:
                    self.exclusions.append(Exclusion(choice.label, mixer.label, reason))

    def ready(self, rows: Sequence[Row]) -> list[Member]:
        """Every cell that can be named now, those that the run has already included.

        First the sweep; when a pair's sweep is done, its best rate on the validation split decides the cells of the other seeds;
        when a run at that rate is done, its one evaluation on the test split follows, and of seed 0 its matrices. Softmax at its
        best rate is trained once more, through the reference backend.
        """
        index = {(row.member.role, row.member.task, row.member.mixer, row.key): row for row in rows}
        members: list[Member] = []
        for task, mixer in self.pairs:
            sweep = [self.train("sweep", task, mixer, rate, SWEEP_SEED) for rate in task.budget["learning_rates"]]
            members += sweep
            found = [index.get(("sweep", m.task, m.mixer, m.cell.key)) for m in sweep]
            best = best_rate(task, [row for row in found if row is not None])
            if best is None or any(row is None or row.status not in ("finished", "failed") for row in found):
                continue
            seeds = [self.train("seed", task, mixer, best, seed) for seed in range(self.suite.seeds) if seed != SWEEP_SEED]
            members += seeds
            if self.suite.control and mixer.name == REFERENCE:
                members.append(self.train("control", task, mixer, best, SWEEP_SEED, backend="reference"))
            for member in (self.train("sweep", task, mixer, best, SWEEP_SEED), *seeds):
                row = index.get((member.role, member.task, member.mixer, member.cell.key))
                if row is not None and row.result is not None and row.result["status"] == "finished":
                    members.append(self.of_trained("test", member))
                    if member.cell.spec["seed"] == SWEEP_SEED and mixer_info(mixer.name).supports.mixing_matrix:
                        members.append(self.of_trained("matrix", member))
        return members + self._rounding() + self._timings()

    def expected(self) -> dict[Role, int]:
        """How many cells of each role there will be if nothing diverges."""
        pairs = len(self.pairs)
        controls = sum(mixer.name == REFERENCE for _, mixer in self.pairs) if self.suite.control else 0
        counts: dict[Role, int] = {
            "sweep": sum(len(task.budget["learning_rates"]) for task, _ in self.pairs),
            "seed": pairs * (self.suite.seeds - 1),
            "test": pairs * self.suite.seeds,
            "matrix": sum(mixer_info(mixer.name).supports.mixing_matrix for _, mixer in self.pairs),
            "control": controls,
            "rounding": controls,
            "timing": len(self._timings()),
        }
        return counts

    def train(self, role: Role, task: PlannedTask, mixer: MixerChoice, rate: float, seed: int, backend: str = "auto") -> Member:
        """One training run."""
        budget = {key: value for key, value in task.budget.items() if key != "learning_rates"}
        spec = {**_subject(task, mixer), "budget": budget, "learning_rate": rate, "seed": seed, "backend": backend}
        return Member(role, task.label, mixer.label, Cell("train", spec))

    @staticmethod
    def of_trained(kind: Literal["test", "matrix"], trained: Member) -> Member:
        """The evaluation of a training run on the test split, or its matrices."""
        spec = {**trained.cell.spec, "trained": trained.cell.key}
        return Member(kind, trained.task, trained.mixer, Cell(kind, spec))

    def _rounding(self) -> list[Member]:
        if not self.suite.control:
            return []
        return [
            Member("rounding", task.label, mixer.label, Cell("rounding", {**_subject(task, mixer), "budget": task.budget}))
            for task, mixer in self.pairs
            if mixer.name == REFERENCE
        ]

    def _timings(self) -> list[Member]:
        timing = self.suite.timing
        if timing is None:
            return []
        common = {"timing": json.loads(json.dumps(asdict(timing))), "machine": self.machine, "code": code_version()}
        return [
            Member("timing", "", mixer.label, Cell("timing", {**_mixer(mixer), "causal": can_be_causal(mixer.name), **common}))
            for mixer in self.suite.mixers
        ]


def _mixer(mixer: MixerChoice) -> dict[str, Any]:
    source = foreign_source(mixers.get(mixer.name).factory)
    known = {} if source is None else {"source": source}
    return {"mixer": {"name": mixer.name, "options": dict(mixer.options), **known}}


def _subject(task: PlannedTask, mixer: MixerChoice) -> dict[str, Any]:
    what = {"name": task.name, "options": task.options, "fingerprint": task.fingerprint}
    return {**_mixer(mixer), "task": what, "code": code_version()}


def why_not(task: PlannedTask, mixer: MixerChoice) -> str | None:
    """Why the task's model cannot be built with the mixer at the budget; None if it can, or if only trying will tell.

    Raises:
        UnknownNameError: for a wrong option.
    """
    causal = load_task(task.name, task.options).model == "causal_lm"
    if causal and not can_be_causal(mixer.name):
        return "no causal form, and this task predicts the next token"
    try:
        build_model(task.name, task.options, mixer.name, mixer.options, task.budget, seed=0)
    except UnsupportedError as error:
        return str(error)
    except ValueError as error:
        amount = "parameters" if task.budget["match"] == "parameters" else "parameters' work"
        return f"no model of {task.budget['parameters']:,} {amount}: {error}"
    return None


def build_model(
    task: str, task_options: Mapping[str, Any], mixer: str, options: Mapping[str, Any], budget: Mapping[str, Any], seed: int
) -> Any:
    """The reference model of a task at a budget; see `attnlab.tasks.reference_model`."""
    return reference_model(
        load_task(task, task_options),
        mixer,
        mixer_options=dict(options),
        model_options=budget["model"],
        match=budget["match"],
        parameters=budget["parameters"],
        depth=budget["depth"],
        num_heads=budget["num_heads"],
        seed=seed,
    )


def best_rate(task: PlannedTask, sweep: Sequence[Row]) -> float | None:
    """The learning rate with the best validation metric among the runs that finished; None if none did."""
    scored = []
    for row in sweep:
        value = None if row.result is None or row.result["status"] != "finished" else row.result["metrics"].get(task.metric)
        if value is not None and math.isfinite(value):
            scored.append((value if task.higher_is_better else -value, -row.member.cell.spec["learning_rate"]))
    return -max(scored)[1] if scored else None


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as a run's facts keep it, so that a report needs neither tasks nor mixers."""
    infos = {mixer.label: mixer_info(mixer.name) for mixer in plan.suite.mixers}
    return {
        "suite": json.loads(json.dumps(asdict(plan.suite))),
        "tasks": [asdict(task) for task in plan.tasks.values()],
        "mixers": [
            {
                "label": mixer.label,
                "name": mixer.name,
                "options": dict(mixer.options),
                "summary": infos[mixer.label].summary,
                "family": infos[mixer.label].family,
                "paper": infos[mixer.label].paper,
                "supports": {
                    key: sorted(value) if isinstance(value, frozenset) else value
                    for key, value in asdict(infos[mixer.label].supports).items()
                },
            }
            for mixer in plan.suite.mixers
        ],
        "exclusions": [asdict(exclusion) for exclusion in plan.exclusions],
        "expected": plan.expected(),
    }
