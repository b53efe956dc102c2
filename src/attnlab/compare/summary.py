"""What a run found: scores, ranks, the control's outcome, layer costs; all that the report and the command line show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from attnlab.compare.contrasts import Contrast, Question, Rank, Verdict, contrasts, detectable, holm, rank, typical_deviation
from attnlab.compare.control import Tie, judge
from attnlab.compare.costs import LayerCosts, read_costs
from attnlab.compare.ledger import Row
from attnlab.compare.plan import PlannedTask, best_rate
from attnlab.compare.statistics import Interval, mean_interval, sign_flip_p
from attnlab.compare.suites import REFERENCE

State = Literal["scored", "unfinished", "diverged", "failed", "excluded"]


@dataclass(frozen=True)
class Score:
    """A mixer on a task.

    Args:
        task: label of the task.
        mixer: label of the mixer.
        state: "scored", or why there is no score.
        reason: the same in words; of a score, what is missing from it.
        rate: the learning rate that the sweep chose.
        sweep: each rate with the validation metric at the sweep's seed; None where the run diverged or failed.
        seeds: those of the runs at the chosen rate that came to an end.
        valid: their validation metric.
        test: their test metric.
        interval: mean and interval of ``test``.
        rank: among the mixers of the task.
        against: against softmax attention, by the paired test over seeds, corrected for all such tests of the run.
        beats_baselines: whether every seed is better than every trivial baseline on the test split.
        parameters: of the model.
        width: of the model.
        seconds: mean processor time of a training run, which other work on the machine does not lengthen.
        tokens_per_second: tokens trained on per second of it.
        curves: for each seed rows (step, training loss or None, seconds).
    """

    task: str
    mixer: str
    state: State
    reason: str = ""
    rate: float | None = None
    sweep: tuple[tuple[float, float | None], ...] = ()
    seeds: tuple[int, ...] = ()
    valid: tuple[float, ...] = ()
    test: tuple[float, ...] = ()
    interval: Interval | None = None
    rank: Rank | None = None
    against: Contrast | None = None
    beats_baselines: bool | None = None
    parameters: int | None = None
    width: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    curves: tuple[Any, ...] = ()

    @property
    def versus(self) -> Verdict | None:
        """The verdict of ``against``."""
        return None if self.against is None else self.against.verdict

    @property
    def by_seed(self) -> dict[int, float]:
        """The test metric of each seed."""
        return dict(zip(self.seeds, self.test, strict=True))


@dataclass(frozen=True)
class Overall:
    """A mixer against softmax attention over all tasks and seeds: mean difference in units of a task's spread, and its p.

    The p value is that of flipping signs, corrected by Holm for the number of mixers.
    """

    mixer: str
    effect: float
    pairs: int
    p: float


@dataclass(frozen=True)
class Summary:
    """A run, summarised.

    Args:
        facts: what the run recorded before it started.
        tasks: the tasks by label.
        mixers: facts of each mixer by label.
        scores: one a pair of task and mixer, excluded pairs too.
        costs: of each mixer that was timed.
        ties: the control, one a task.
        overall: each mixer against softmax over all tasks.
        failures: cells that failed: label and error.
        counts: cells by status, and "expected".
        gallery: for each pair of task and mixer the matrices of its trained layers, as `attnlab.compare.matrices` gives them.
    """

    facts: Mapping[str, Any]
    tasks: dict[str, PlannedTask]
    mixers: dict[str, dict[str, Any]]
    scores: tuple[Score, ...]
    costs: dict[str, LayerCosts]
    ties: tuple[Tie, ...]
    overall: tuple[Overall, ...]
    failures: tuple[tuple[str, str], ...]
    counts: dict[str, int] = field(default_factory=dict)
    gallery: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)

    def score(self, task: str, mixer: str) -> Score:
        """The score of a pair; KeyError if the run has no such pair."""
        for score in self.scores:
            if (score.task, score.mixer) == (task, mixer):
                return score
        raise KeyError(f"no score of {mixer!r} on {task!r}")

    def told(self, task: str) -> float | None:
        """The smallest difference in the task's metric that its seeds tell with probability 0.8, one pair tested at 5 %."""
        seeds = [score.by_seed for score in self.scores if score.task == task and score.test]
        deviation = typical_deviation(seeds)
        return None if deviation is None else detectable(deviation, min(len(values) for values in seeds))

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return not self.failures and all(score.state != "unfinished" for score in self.scores)

    @property
    def trusted(self) -> bool:
        """Whether no control came apart and no gate failed."""
        return all(tie.holds is not False for tie in self.ties) and all(cost.passed for cost in self.costs.values())

    @property
    def ok(self) -> bool:
        """Whether everything ran, every control that was asked for ties, and every gate passed."""
        return self.complete and self.trusted and all(tie.holds for tie in self.ties)


def summarise(facts: Mapping[str, Any], rows: Sequence[Row]) -> Summary:
    """Summarise the members of a run."""
    tasks = {task["label"]: PlannedTask(**task) for task in facts["tasks"]}
    mixers = {mixer["label"]: mixer for mixer in facts["mixers"]}
    excluded = {(item["task"], item["mixer"]): item["reason"] for item in facts["exclusions"]}
    scores = []
    for label, task in tasks.items():
        found = {}
        for name in mixers:
            reason = excluded.get((label, name))
            own = [row for row in rows if (row.member.task, row.member.mixer) == (label, name)]
            found[name] = _score(task, name, own) if reason is None else Score(label, name, "excluded", reason)
        scores += _ranked(task, found)
    scores = _against(tasks, scores, _reference(mixers))
    ties = tuple(_tie(task, rows, scores, mixers) for task in tasks.values()) if facts["suite"]["control"] else ()
    statuses = [row.status for row in rows]
    return Summary(
        facts,
        tasks,
        mixers,
        tuple(scores),
        read_costs(rows),
        tuple(tie for tie in ties if tie is not None),
        _overall(tasks, scores, _reference(mixers)),
        tuple((row.member.cell.label, row.error or "") for row in rows if row.status == "failed"),
        {**{status: statuses.count(status) for status in sorted(set(statuses))}, "expected": sum(facts["expected"].values())},
        {
            (row.member.task, row.member.mixer): row.result["layers"]
            for row in rows
            if row.member.role == "matrix" and row.result is not None
        },
    )


def _reference(mixers: Mapping[str, Mapping[str, Any]]) -> str | None:
    return next((label for label, mixer in mixers.items() if mixer["name"] == REFERENCE), None)


def _score(task: PlannedTask, mixer: str, rows: Sequence[Row]) -> Score:
    sweep = [row for row in rows if row.member.role == "sweep"]
    values = {row.member.cell.spec["learning_rate"]: _metric(row, task.metric) for row in sweep if row.result is not None}
    swept = tuple((rate, values.get(rate)) for rate in task.budget["learning_rates"])
    settled = len(sweep) == len(swept) and all(row.status in ("finished", "failed") for row in sweep)
    best = best_rate(task, sweep)
    if best is None or not settled:
        if not settled:
            return Score(task.label, mixer, "unfinished", "the sweep is not done", sweep=swept)
        diverged = any(row.status == "finished" for row in sweep)
        reason = "training diverged at every learning rate" if diverged else f"every run failed: {sweep[0].error}"
        return Score(task.label, mixer, "diverged" if diverged else "failed", reason, sweep=swept)
    trained = [row for row in rows if row.member.role in ("sweep", "seed") and row.member.cell.spec["learning_rate"] == best]
    trained.sort(key=lambda row: row.member.cell.spec["seed"])
    tests = {row.member.cell.spec["trained"]: row for row in rows if row.member.role == "test"}
    kept = [row for row in trained if row.key in tests and _metric(tests[row.key], task.metric) is not None]
    test = tuple(float(_metric(tests[row.key], task.metric) or 0.0) for row in kept)
    pending = any(row.status not in ("finished", "failed") for row in [*trained, *tests.values()])
    state: State = "unfinished" if pending or not test else "scored"
    lost = len(trained) - len(kept)
    reason = "not all of its runs are done" if state == "unfinished" else f"{lost} seed{'s' * (lost > 1)} lost" if lost else ""
    results = [row.result for row in kept if row.result is not None]
    strongest = best_of(task, list(task.baselines["test"].values()))
    return Score(
        task.label,
        mixer,
        state,
        reason,
        best,
        swept,
        tuple(row.member.cell.spec["seed"] for row in kept),
        tuple(float(_metric(row, task.metric) or 0.0) for row in kept),
        test,
        mean_interval(test, task.resolution) if test else None,
        beats_baselines=all(task.better(value, strongest) for value in test) if test else None,
        parameters=results[0]["parameters"] if results else None,
        width=results[0]["width"] if results else None,
        seconds=float(np.mean([result["cpu_seconds"] for result in results])) if results else None,
        tokens_per_second=float(np.mean([r["tokens"] / max(r["cpu_seconds"], 1e-9) for r in results])) if results else None,
        curves=tuple(result["curve"] for result in results),
    )


def _metric(row: Row, metric: str) -> float | None:
    if row.result is None or row.result.get("status", "finished") != "finished":
        return None
    return row.result["metrics"].get(metric)


def best_of(task: PlannedTask, values: Sequence[float]) -> float:
    """The best of some values of the task's metric."""
    return max(values) if task.higher_is_better else min(values)


def _ranked(task: PlannedTask, scores: Mapping[str, Score]) -> list[Score]:
    values = {name: score.by_seed for name, score in scores.items() if score.test}
    ranks = rank(values, higher_is_better=task.higher_is_better, resolution=task.resolution)
    return [replace(score, rank=ranks.get(name)) for name, score in scores.items()]


def _against(tasks: Mapping[str, PlannedTask], scores: Sequence[Score], reference: str | None) -> list[Score]:
    """The scores with their contrasts to softmax attention, all tested as one family."""
    baseline = {score.task: score for score in scores if score.mixer == reference and score.test}
    asked = [score for score in scores if score.test and score.task in baseline and score.mixer != reference]
    questions = [
        Question(score.by_seed, baseline[score.task].by_seed, tasks[score.task].higher_is_better, tasks[score.task].resolution)
        for score in asked
    ]
    found = {(score.task, score.mixer): answer for score, answer in zip(asked, contrasts(questions), strict=True)}
    return [replace(score, against=found.get((score.task, score.mixer))) for score in scores]


def _tie(task: PlannedTask, rows: Sequence[Row], scores: Sequence[Score], mixers: Mapping[str, Mapping[str, Any]]) -> Tie | None:
    reference = _reference(mixers)
    own = [row for row in rows if (row.member.task, row.member.mixer) == (task.label, reference)]
    if reference is None or not own:
        return None
    agrees = next((row.result["passed"] for row in own if row.member.role == "rounding" and row.result is not None), None)
    second = next((_metric(row, task.metric) for row in own if row.member.role == "control"), None)
    here = {score.mixer: score for score in scores if score.task == task.label}
    first = here[reference].valid[0] if here[reference].valid else None
    seeds = [score.valid for score in here.values() if score.valid]
    results = [row.result for row in own if row.member.role == "control" and row.result is not None]
    tie = judge(task.label, first, second, seeds, agrees, resolution=task.resolution)
    return replace(tie, distance=results[0].get("distance") if results else None)


def _overall(tasks: Mapping[str, PlannedTask], scores: Sequence[Score], reference: str | None) -> tuple[Overall, ...]:
    names = [name for name in dict.fromkeys(score.mixer for score in scores) if name != reference]
    found = []
    for name in names:
        differences: list[float] = []
        for label, task in tasks.items():
            here = {score.mixer: score for score in scores if score.task == label and score.test}
            if reference not in here or name not in here:
                continue
            spread = float(np.std([np.mean(score.test) for score in here.values()])) or 1.0
            sign = 1.0 if task.higher_is_better else -1.0
            ours, theirs = here[name].by_seed, here[str(reference)].by_seed
            differences += [sign * (ours[seed] - theirs[seed]) / spread for seed in sorted(set(ours) & set(theirs))]
        if len(differences) > 1:
            found.append(Overall(name, float(np.mean(differences)), len(differences), sign_flip_p(differences)))
    return tuple(replace(entry, p=p) for entry, p in zip(found, holm([entry.p for entry in found]), strict=True))
