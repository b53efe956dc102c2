"""The work of one cell: train, test, compare rounding, or time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from attnlab.compare.cells import Cell
from attnlab.compare.control import rounding
from attnlab.compare.layers import Layer
from attnlab.compare.matrices import matrices
from attnlab.compare.measure import measure
from attnlab.compare.plan import build_model, load_task
from attnlab.compare.suites import Timing
from attnlab.ops.backends import use_backend
from attnlab.training import LogRow, evaluate, train

CURVE_POINTS = 25


class Interrupted(Exception):
    """Work was stopped from outside; the cell is given back."""


@dataclass(frozen=True)
class Done:
    """What a cell gave: a result that JSON can hold, and the trained parameters of a training run."""

    result: dict[str, Any]
    weights: bytes | None = None


def perform(cell: Cell, weights: Callable[[str], bytes], check: Callable[[], None]) -> Done:
    """Do the work of a cell.

    Args:
        cell: what to do.
        weights: gives the parameters that a training cell ended with, by its key.
        check: called every now and then; raises `Interrupted` to stop.
    """
    work = {"train": _train, "test": _test, "matrix": _matrix, "rounding": _rounding, "timing": _timing}[cell.kind]
    return work(cell.spec, weights, check)


def needs(cell: Cell) -> tuple[str, ...]:
    """Keys of the training cells whose parameters the work of ``cell`` reads."""
    if cell.kind in ("test", "matrix"):
        return (cell.spec["trained"],)
    if cell.kind == "train" and cell.spec["backend"] != "auto":
        return (_counterpart(cell.spec),)
    return ()


def _counterpart(spec: Mapping[str, Any]) -> str:
    """Key of the same training run by the usual backend, with which the control is compared."""
    return Cell("train", {**spec, "backend": "auto"}).key


def _model(spec: Mapping[str, Any]) -> Any:
    task, mixer = spec["task"], spec["mixer"]
    return build_model(task["name"], task["options"], mixer["name"], mixer["options"], spec["budget"], spec["seed"])


def _train(spec: Mapping[str, Any], weights: Callable[[str], bytes], check: Callable[[], None]) -> Done:
    built, budget = _model(spec), spec["budget"]

    def watch(row: LogRow) -> None:
        check()

    task = load_task(spec["task"]["name"], spec["task"]["options"])
    with use_backend(spec["backend"]):
        begun = time.process_time()
        outcome = train(
            built.model,
            task,
            steps=budget["steps"],
            batch_size=budget["batch_size"],
            learning_rate=spec["learning_rate"],
            weight_decay=budget["weight_decay"],
            warmup=budget["warmup"],
            seed=spec["seed"],
            log_every=max(1, budget["steps"] // CURVE_POINTS),
            callback=watch,
            eval_split=None,
        )
        used = time.process_time() - begun
        metrics = {} if outcome.status == "diverged" else evaluate(built.model, task, "valid")
    result = {
        "status": outcome.status,
        "steps": outcome.steps,
        "metrics": finite(metrics),
        "curve": [[row.step, *finite({"loss": row.loss}).values(), round(row.seconds, 4)] for row in outcome.history],
        "seconds": outcome.seconds,
        "cpu_seconds": used,
        "tokens": round(outcome.tokens_per_second * outcome.seconds),
        "parameters": built.parameters,
        "width": built.width,
        "hidden": built.hidden,
        "threads": torch.get_num_threads(),
    }
    # Clones, because tied parameters share memory, which safetensors refuses.
    state = {name: value.detach().clone().contiguous() for name, value in built.model.state_dict().items()}
    if spec["backend"] != "auto":
        result["distance"] = _distance(state, load(weights(_counterpart(spec))))
    return Done(result, save(state))


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """How far two sets of parameters are apart, relative to the size of the second."""
    names = sorted(b)  # safetensors gives them in any order, and sums round by it
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in names)
    return math.sqrt(apart / sum(float(b[name].double().square().sum()) for name in names))


def _test(spec: Mapping[str, Any], weights: Callable[[str], bytes], check: Callable[[], None]) -> Done:
    model = cast(nn.Module, _model(spec).model)
    model.load_state_dict(load(weights(spec["trained"])))
    task = load_task(spec["task"]["name"], spec["task"]["options"])
    return Done({"metrics": finite(evaluate(model, task, "test"))})


def _matrix(spec: Mapping[str, Any], weights: Callable[[str], bytes], check: Callable[[], None]) -> Done:
    model = cast(nn.Module, _model(spec).model)
    model.load_state_dict(load(weights(spec["trained"])))
    task = load_task(spec["task"]["name"], spec["task"]["options"])
    return Done({"layers": matrices(model.eval(), next(task.eval_batches(1, "valid")))})


def _rounding(spec: Mapping[str, Any], weights: Callable[[str], bytes], check: Callable[[], None]) -> Done:
    return Done(rounding(spec).record())


def _timing(spec: Mapping[str, Any], weights: Callable[[str], bytes], check: Callable[[], None]) -> Done:
    mixer, sizes = spec["mixer"], dict(spec["timing"])
    timing = Timing(tuple(sizes.pop("lengths")), tuple(sizes.pop("memory_lengths")), **sizes)
    layer = Layer(mixer["name"], spec["causal"], timing.dim, timing.num_heads, timing.batch_size, mixer["options"], timing.device)
    return Done(measure(layer, timing, check))


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The same with None for what is not finite, which JSON cannot hold."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
