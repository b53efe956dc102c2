"""What a trained model attends to: the mixing matrices of its layers on one example, as small images."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.contract import Mixer
from attnlab.core.errors import UnsupportedError
from attnlab.tasks import Batch

LARGEST = 64
"""Rows and columns of an image; longer sequences are shown in groups of tokens."""


def matrices(model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
    """The mixing matrix of each layer's mixer on the first example, the mean of its heads.

    Args:
        model: a trained model, in evaluation mode.
        batch: one example.

    Returns:
        For each layer that has a matrix: its path in the model, its sides, the number of tokens in a group, the largest entry,
        and the entries as signed bytes in base64, rows first, as shares of the largest.
    """
    calls: list[tuple[str, Mixer, tuple[Any, ...], dict[str, Any]]] = []
    with torch.no_grad():
        hooks = [
            module.register_forward_pre_hook(_noting(calls, path), with_kwargs=True)
            for path, module in model.named_modules()
            if isinstance(module, Mixer)
        ]
        try:
            batch.through(model)
        finally:
            for hook in hooks:
                hook.remove()
        found = []
        for path, mixer, args, kwargs in calls:
            if not mixer.supports.mixing_matrix:
                continue
            try:
                whole = mixer.mixing_matrix(*args, **kwargs)
            except UnsupportedError:
                continue
            found.append({"layer": path, **_image(whole[0].float().mean(0))})
    return found


def _noting(calls: list[Any], path: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((path, module, args, kwargs))

    return note


def _image(matrix: Float[Tensor, "n m"]) -> dict[str, Any]:
    """The matrix in groups of tokens: sums over keys and means over queries, so that rows keep their sums."""
    group = max(1, math.ceil(max(matrix.shape) / LARGEST))
    if group > 1:
        rows, columns = (-(-side // group) for side in matrix.shape)
        padded = matrix.new_zeros(rows * group, columns * group)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        counts = torch.full((rows,), group)
        counts[-1] = matrix.shape[0] - (rows - 1) * group
        matrix = padded.view(rows, group, columns, group).sum((1, 3)) / counts[:, None]
    largest = float(matrix.abs().max())
    scaled = (matrix / (largest or 1.0) * 127).round().to(torch.int8)
    data = base64.b64encode(scaled.numpy().tobytes()).decode()
    return {"rows": matrix.shape[0], "columns": matrix.shape[1], "group": group, "largest": largest, "data": data}
