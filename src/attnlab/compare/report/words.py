"""Numbers and findings in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from attnlab.compare.plan import SHARES, PlannedTask
from attnlab.compare.statistics import Interval
from attnlab.compare.suites import REFERENCE
from attnlab.compare.summary import Score, Summary, best_of

METRICS = {"accuracy": "accuracy", "bits_per_byte": "bits per byte"}


def metric_name(task: PlannedTask) -> str:
    """The metric with its direction: ``"accuracy, higher is better"``."""
    direction = "higher" if task.higher_is_better else "lower"
    return f"{METRICS.get(task.metric, task.metric.replace('_', ' '))}, {direction} is better"


def value_text(task: PlannedTask, value: float | None) -> str:
    """A value of the task's metric: shares in per cent, others with three decimals."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if task.metric in SHARES else f"{value:.3f}"


def half_width_text(task: PlannedTask, interval: Interval | None) -> str:
    """Half of an interval's width, in the metric's unit: ``"± 1.2"``; empty where there is no interval."""
    if interval is None or interval.high is None:
        return ""
    half = interval.high - interval.mean
    return f"± {100 * half:.1f}" if task.metric in SHARES else f"± {half:.3f}"


def bytes_text(count: int | float | None) -> str:
    """``"512 B"``, ``"1.5 KiB"``, ``"24 MiB"``."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def seconds_text(seconds: float | None) -> str:
    """``"85 µs"``, ``"2.4 ms"``, ``"3.1 s"``."""
    if seconds is None:
        return "–"
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def count_text(count: int | float | None) -> str:
    """``"1,234"``, ``"56.7 k"``, ``"3.2 M"``, ``"1.1 G"``."""
    if count is None:
        return "–"
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if count >= factor:
            return f"{count / min(factor, 1e3 if unit == ' k' else factor):.3g}{unit}"
    return f"{count:,.0f}"


def listing(names: Iterable[str], most: int = 6) -> str:
    """``"a, b and c"``, cut after ``most``."""
    found = list(names)
    if len(found) > most:
        found = [*found[: most - 1], f"{len(found) - most + 1} more"]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + f" and {found[-1]}"


_SYMBOLS = {"phi": "φ", "sigma": "σ", "alpha": "α", "beta": "β", "gamma": "γ", "lambda": "λ", "top": "ᵀ", "le": "≤", "cdot": "·"}


def plain_text(docstring: str) -> str:
    """A line of a docstring without its mark-up: quotes of code go, formulas become what can be written in a line."""
    text = re.sub(r"`+([^`]*)`+", r"\1", docstring)
    text = re.sub(r"\\(?:mathrm|mathbf|text|operatorname)\{([^}]*)\}", r"\1", text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda found: _SYMBOLS.get(found[1], found[1]), text)
    return re.sub(r"\$([^$]*)\$", r"\1", text)


def headlines(summary: Summary) -> list[str]:
    """What to take from the run, a sentence or two an item; the first says whether it may be trusted."""
    items = [_trust(summary)]
    items += [line for task in summary.tasks.values() if (line := _quality(summary, task))]
    items += _against_softmax(summary)
    items += _speed(summary)
    return items


def _trust(summary: Summary) -> str:
    if not summary.trusted:
        apart = [tie.task for tie in summary.ties if tie.holds is False]
        wrong = [name for name, cost in summary.costs.items() if not cost.passed]
        parts = [f"the equivalence control does not tie on {listing(apart)}"] if apart else []
        parts += [f"the correctness gate failed for {listing(wrong)}"] if wrong else []
        return "Do not trust this run yet: " + "; ".join(parts) + "."
    tied = [tie.task for tie in summary.ties if tie.holds]
    words = []
    if tied:
        words.append(f"softmax attention through two backends ties on {listing(tied)}")
    if summary.costs:
        words.append(f"all {len(summary.costs)} timed mechanisms agree with the reference backend in outputs and gradients")
    start = "The checks hold: " + "; ".join(words) if words else "No control and no timing was part of this run"
    unfinished = "" if summary.complete else ". The run is not complete: what is missing is named below"
    return f"{start}{unfinished}."


def _quality(summary: Summary, task: PlannedTask) -> str:
    scores = ordered(summary, task)
    if not scores:
        return ""
    best = scores[0]
    seeds = len(best.test)
    same = [score.mixer for score in scores[1:] if score.rank is not None and score.rank.best == 1]
    if seeds < 2:
        told = "one seed tells no two mechanisms apart"
    elif same:
        told = f"the paired test over {seeds} seeds cannot tell it from {listing(same)}"
    else:
        told = f"the paired test over {seeds} seeds tells it from every other"
    name, strongest = best_baseline(task)
    above = [score for score in scores if score.beats_baselines]
    mean = value_text(task, best.interval.mean if best.interval else None)
    baseline = f"{name}, {value_text(task, strongest)}"
    return (
        f"{task.label}: {best.mixer} has the best mean, {mean} ({METRICS.get(task.metric, task.metric)}); {told}. "
        f"{len(above)} of {len(scores)} mechanisms beat the best trivial baseline ({baseline}) in every seed."
    )


def _against_softmax(summary: Summary) -> list[str]:
    told = [entry for entry in summary.overall if entry.p < 0.05]
    better = [entry.mixer for entry in told if entry.effect > 0]
    worse = [entry.mixer for entry in told if entry.effect < 0]
    if not summary.overall:
        return []
    parts = [f"{listing(better)} did better than softmax attention"] if better else []
    parts += [f"{listing(worse)} did worse than softmax attention"] if worse else []
    if not parts:
        return ["Over all tasks and seeds together, no mechanism can be told from softmax attention (sign-flip test, 5 %)."]
    return [
        "Over all tasks and seeds together "
        + ", and ".join(parts)
        + " (sign-flip test, 5 %, corrected for the number of mechanisms)."
    ]


def _speed(summary: Summary) -> list[str]:
    timed = {
        name: cost
        for name, cost in summary.costs.items()
        if cost.times and cost.causal and summary.mixers[name]["name"] != REFERENCE
    }
    if not timed:
        return []
    longest = max(max(cost.times["training"]) for cost in timed.values())
    ratios = {name: cost.times["training"][longest]["ratio"] for name, cost in timed.items()}
    fastest = min(ratios, key=lambda name: ratios[name])
    text = (
        f"Among causal layers at {longest:,} tokens {fastest} is the fastest in training: {ratios[fastest]:.2g} of the time of "
        "softmax attention through PyTorch's fused kernel."
    )
    found = {name: cost.crossover("training") for name, cost in timed.items()}
    never = [name for name, crossing in found.items() if crossing is not None and crossing.where == "never"]
    if never:
        text += f" Within the measured lengths {listing(never)} {'is' if len(never) == 1 else 'are'} never faster than it."
    return [text]


def ordered(summary: Summary, task: PlannedTask) -> list[Score]:
    """The scores of a task that have a mean, best first."""
    found = [score for score in summary.scores if score.task == task.label and score.interval is not None]
    sign = -1.0 if task.higher_is_better else 1.0
    return sorted(found, key=lambda score: sign * (score.interval.mean if score.interval else 0.0))


def best_baseline(task: PlannedTask) -> tuple[str, float]:
    """Name and value of the strongest trivial baseline on the test split."""
    values = task.baselines["test"]
    value = best_of(task, list(values.values()))
    return next(name for name in values if values[name] == value).replace("_", " "), value


def exclusions(summary: Summary) -> list[tuple[str, str, str]]:
    """Mixers that could not be what a task needs, by task and reason: mixers, task, reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for item in summary.facts["exclusions"]:
        groups.setdefault((item["task"], item["reason"]), []).append(item["mixer"])
    return [(listing(names, 20), task, reason) for (task, reason), names in groups.items()]


def at_the_edge(summary: Summary) -> int:
    """How many sweeps of three or more rates chose the smallest or the largest."""
    swept = [(score.rate, [rate for rate, _ in score.sweep]) for score in summary.scores if score.rate is not None]
    return sum(rate in (min(rates), max(rates)) for rate, rates in swept if len(rates) > 2)


def power_notes(summary: Summary) -> list[str]:
    """What differences the seeds of each task can tell, and how many the differences seen would need."""
    notes = []
    for label, task in summary.tasks.items():
        smallest = summary.told(label)
        if smallest is None:
            continue
        open_ = [s for s in summary.scores if s.task == label and s.against is not None and s.against.verdict == "cannot tell"]
        needed = sorted(s.against.seeds_needed for s in open_ if s.against is not None and s.against.seeds_needed is not None)
        seen = (
            f" The differences from softmax attention that remain open would need {needed[0]} seeds and more (median "
            f"{needed[len(needed) // 2]}) to be told as they are."
            if needed
            else ""
        )
        notes.append(
            f"Power on {label}: a pair that differs by {value_text(task, smallest)} in {metric_name(task)} is told with "
            f"probability 0.8, before correction; smaller differences are likely to stay open.{seen}"
        )
    return notes


def limits(summary: Summary) -> Sequence[str]:
    """What this evidence cannot show."""
    seeds = int(summary.facts["suite"]["seeds"])
    costs = [
        "Layer times are of this machine, in float32, and of these implementations; a mechanism may have faster kernels "
        "elsewhere."
    ]
    if not summary.tasks:
        return [*costs, "Nothing was trained: speed says nothing of quality."]
    rates = len(next(iter(summary.tasks.values())).budget["learning_rates"])
    freedom = " with one degree of freedom, and therefore wide" if seeds == 2 else ""
    edge = at_the_edge(summary)
    few = " Fewer than three cannot bracket the best one." if rates < 3 else ""
    edges = f" In {edge} sweep{'s' if edge > 1 else ''} the best rate was the smallest or the largest tried." if edge else ""
    return [
        f"{'One seed' if seeds == 1 else f'{seeds} seeds'} a mechanism: intervals are Student's t over seeds{freedom}. They do "
        "not cover the choice of evaluation examples, nor that of the learning rate.",
        f"{rates} learning rate{'s' if rates > 1 else ''} tried, with one seed: a coarse sweep can misrank mechanisms, "
        f"recurrent ones above all.{few}{edges}",
        *power_notes(summary),
        "Ranks are corrected for the number of pairs of a task, comparisons with softmax attention for all of the run (Holm): "
        "one wrong statement among them all has a chance of at most 5 %.",
        "Small models, short training, short sequences: what holds here need not hold at scale.",
        *costs,
        "Training is counted in processor time of whole runs at the sizes of the tasks, most of which is not the mixer; layer "
        "times are measured in pairs, in which what else the machine does cancels.",
    ]
