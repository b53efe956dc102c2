"""The reference model of a task: everything fixed but the mixer, at a parameter budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnlab.models import Matched
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
        parameters: to be met within ``tolerance`` by choosing the width (and the channel mixer's hidden width).
        dim: a width to take as it is instead; then ``parameters`` must be None.
        depth: blocks.
        num_heads: heads.
        seed: of the initial parameters; torch's own generator is left as it was.
        tolerance: allowed relative error of the parameter count.
        device: where the model is built.
        dtype: of its parameters.

    Raises:
        UnsupportedError: if the mixer cannot be what the task's model needs.
        ValueError: if no width meets the budget.
    """
    raise NotImplementedError
