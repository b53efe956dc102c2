"""Results as plain records, and their export as CSV and JSON."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnlab.compare.ledger import Row
from attnlab.compare.measure import DIRECTIONS
from attnlab.compare.summary import Summary

TRAINING_COLUMNS = (
    "role", "task", "mixer", "learning_rate", "seed", "backend", "status", "split", "metric", "value", "loss", "steps",
    "seconds", "cpu_seconds", "tokens", "parameters", "width", "threads", "key",
)  # fmt: skip
COPIED = ("steps", "seconds", "cpu_seconds", "tokens", "parameters", "width", "threads")
TIMING_COLUMNS = (
    "mixer", "causal", "direction", "length", "seconds", "low", "high", "softmax_seconds", "ratio", "ratio_low", "ratio_high",
    "ratio_from", "ratio_to", "pairs", "peak_bytes", "forward_flops", "gate_passed", "threads",
)  # fmt: skip


def training_records(summary: Summary, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One record a training run or test evaluation, in the order of the run."""
    records = []
    for row in rows:
        spec, result = row.member.cell.spec, row.result or {}
        if row.member.cell.kind not in ("train", "test"):
            continue
        metric = summary.tasks[row.member.task].metric
        metrics = result.get("metrics", {})
        records.append(
            {
                "role": row.member.role,
                "task": row.member.task,
                "mixer": row.member.mixer,
                "learning_rate": spec["learning_rate"],
                "seed": spec["seed"],
                "backend": spec["backend"],
                "status": result.get("status", row.status),
                "split": "test" if row.member.role == "test" else "valid",
                "metric": metric,
                "value": metrics.get(metric),
                "loss": metrics.get("loss"),
                **{name: result.get(name) for name in COPIED},
                "key": row.key,
            }
        )
    return records


def timing_records(summary: Summary) -> list[dict[str, Any]]:
    """One record a mixer, direction and length; of a mixer whose gate failed one without any time."""
    records = []
    for cost in summary.costs.values():
        common = {"mixer": cost.mixer, "causal": cost.causal, "gate_passed": cost.passed, "threads": cost.threads}
        if not cost.times:
            records.append({**dict.fromkeys(TIMING_COLUMNS), **common})
        for direction, times in cost.times.items():
            for length, found in times.items():
                values = {"softmax_seconds" if name == "baseline" else name: value for name, value in found.items()}
                counted = {"peak_bytes": cost.memory.get(direction, {}).get(length), "forward_flops": cost.flops.get(length)}
                records.append({**common, "direction": direction, "length": length, **values, **counted})
    return records


def summary_record(summary: Summary) -> dict[str, Any]:
    """The summary as JSON holds it."""
    return {
        "ok": summary.ok,
        "complete": summary.complete,
        "counts": summary.counts,
        "scores": [{key: value for key, value in asdict(score).items() if key != "curves"} for score in summary.scores],
        "control": [{**asdict(tie), "holds": tie.holds} for tie in summary.ties],
        "against_softmax": [asdict(entry) for entry in summary.overall],
        "gates": {name: dict(cost.gate) for name, cost in summary.costs.items()},
        "crossover": {
            name: {
                direction: None if (found := cost.crossover(direction)) is None else {**asdict(found), "text": found.text}
                for direction in DIRECTIONS
            }
            for name, cost in summary.costs.items()
        },
        "growth": {name: {d: cost.exponent(d) for d in DIRECTIONS} for name, cost in summary.costs.items()},
        "state_bytes": {name: cost.state for name, cost in summary.costs.items()},
        "failures": [{"cell": label, "error": error} for label, error in summary.failures],
    }


def write_csv(path: Path, columns: Sequence[str], records: Sequence[Mapping[str, Any]]) -> None:
    """Write records with these columns, whole or not at all."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def export(folder: Path, summary: Summary, rows: Sequence[Row]) -> list[Path]:
    """Write results.csv, timings.csv and results.json into ``folder``; returns their paths."""
    training, timing = training_records(summary, rows), timing_records(summary)
    everything = {"facts": summary.facts, "summary": summary_record(summary), "training": training, "timing": timing}
    paths = [folder / name for name in ("results.csv", "timings.csv", "results.json")]
    write_csv(paths[0], TRAINING_COLUMNS, training)
    write_csv(paths[1], TIMING_COLUMNS, timing)
    write_text(paths[2], json.dumps(everything, indent=1))
    return paths
