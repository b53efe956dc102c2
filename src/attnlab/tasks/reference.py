"""The reference model of a task: everything fixed but the mixer, at a budget of parameters or of work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from attnlab.models import Matched, count_parameters, create_model, match_budget
from attnlab.models.budget import Size
from attnlab.models.flops import count_flops
from attnlab.tasks.contract import Match, Task


def reference_model(
    task: Task,
    mixer: str,
    *,
    mixer_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    match: str = "parameters",
    parameters: int | None = None,
    dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    seed: int = 0,
    tolerance: float = 0.02,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Matched:
    """The model of ``task`` in which only the mixer is chosen; ``.model`` of the result is the initialised model.

    Args:
        task: gives the kind of model, its options, and the defaults of the sizes below.
        mixer: a registered mixer.
        mixer_options: its own options.
        model_options: laid over those of the task.
        match: "parameters": as many of them as ``parameters`` says; "compute": as many floating-point operations of products
            and convolutions an example as the model of that size with softmax attention (element-wise work is not counted).
        parameters: to be met within ``tolerance`` by the width (a multiple of twice the heads) and the channel mixer's.
        dim: a width to take as it is instead; then ``parameters`` must be None.
        depth: blocks.
        num_heads: heads.
        seed: of the initial parameters; torch's own generator is left as it was.
        tolerance: allowed relative error of the parameter count, or of the operations.
        device: where the model is put; its parameters are drawn on the CPU, the same for every device.
        dtype: of its parameters.

    Raises:
        UnsupportedError: if the mixer cannot be what the task's model needs.
        ValueError: if no width meets the budget, for an unknown ``match``, or if both ``dim`` and ``parameters`` are given.
    """
    if match not in get_args(Match):
        raise ValueError(f"match: expected one of {get_args(Match)}, got {match!r}")
    if dim is not None and parameters is not None:
        raise ValueError(f"dim, parameters: expected one of them, got {dim} and {parameters}")
    budget = task.default_budget
    num_heads = budget.num_heads if num_heads is None else num_heads
    common = {"depth": budget.depth if depth is None else depth, "num_heads": num_heads, "dtype": dtype}
    build = _Builder(task.model, {**task.model_options, **(model_options or {}), **common}, mixer, mixer_options)
    find = partial(match_budget, multiple_of=2 * num_heads, tolerance=tolerance)
    if dim is not None:
        found = Matched(dim, None, 0, 0.0)
    else:
        found = _matched(task, build, match == "compute", parameters or budget.parameters, find)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build(found.width, found.hidden).to(device)
    return replace(found, parameters=count_parameters(model), model=model)


@dataclass(frozen=True)
class _Builder:
    """A width, and a hidden width of the channel mixer where one is given, to a model."""

    model: str
    common: Mapping[str, Any]
    mixer: str
    options: Mapping[str, Any] | None

    def __call__(self, width: int, hidden: int | None = None) -> nn.Module:
        own = {} if hidden is None else {"channel_options": {**self.common.get("channel_options", {}), "hidden": hidden}}
        chosen = {"mixer": self.mixer, "mixer_options": self.options}
        return create_model(self.model, **{**self.common, **own, **chosen, "dim": width})


def _matched(task: Task, build: _Builder, by_work: bool, target: int, find: Callable[..., Matched]) -> Matched:
    """The width at which a model has ``target`` parameters, or does the work of the softmax model that has."""
    if not by_work:
        return find(build, target, fine=build)
    work, baseline = _work(task), replace(build, mixer="softmax", options=None)
    size = find(baseline, target, fine=baseline)
    return find(build, work.of(lambda: baseline(size.width, size.hidden)), fine=build, size=work)


def _work(task: Task) -> Size:
    """Operations on one example of the task, forward."""
    batch = next(task.eval_batches(1))

    def of(build: Callable[[], nn.Module]) -> int:
        with torch.random.fork_rng(devices=[]):
            model = build().eval()
            return count_flops(lambda: batch.through(model))

    return Size("operations an example", of)
