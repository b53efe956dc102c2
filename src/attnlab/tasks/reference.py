"""The reference model of a task: everything fixed but the mixer, at a parameter budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from attnlab.models import Matched, count_parameters, create_model, match_budget
from attnlab.tasks.contract import Task


def reference_model(
    task: Task,
    mixer: str,
    *,
    mixer_options: Mapping[str, Any] | None = None,
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
        parameters: to be met within ``tolerance`` by the width (a multiple of twice the heads) and the channel mixer's.
        dim: a width to take as it is instead; then ``parameters`` must be None.
        depth: blocks.
        num_heads: heads.
        seed: of the initial parameters; torch's own generator is left as it was.
        tolerance: allowed relative error of the parameter count.
        device: where the model is put; its parameters are drawn on the CPU, the same for every device.
        dtype: of its parameters.

    Raises:
        UnsupportedError: if the mixer cannot be what the task's model needs.
        ValueError: if no width meets the budget, or both ``dim`` and ``parameters`` are given.
    """
    if dim is not None and parameters is not None:
        raise ValueError(f"dim, parameters: expected one of them, got {dim} and {parameters}")
    budget = task.default_budget
    num_heads = budget.num_heads if num_heads is None else num_heads
    common = {
        **task.model_options,
        "mixer": mixer,
        "mixer_options": mixer_options,
        "depth": budget.depth if depth is None else depth,
        "num_heads": num_heads,
    }

    def build(width: int, hidden: int | None = None) -> nn.Module:
        own = {} if hidden is None else {"channel_options": {**common.get("channel_options", {}), "hidden": hidden}}
        return create_model(task.model, **{**common, **own, "dim": width, "dtype": dtype})

    if dim is None:
        target = budget.parameters if parameters is None else parameters
        match = match_budget(build, target, multiple_of=2 * num_heads, tolerance=tolerance, fine=build)
    else:
        match = Matched(dim, None, 0, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build(match.width, match.hidden).to(device)
    return replace(match, parameters=count_parameters(model), model=model)
