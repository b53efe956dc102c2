"""Recorded vectors: what the authors' code did with given inputs and parameters."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(os.environ.get("ATTNLAB_GOLDEN") or Path(__file__).parent / "data")


@dataclass(frozen=True)
class Recording:
    """One ``.npz`` file with the configuration that its folder's ``meta.json`` gives for it.

    Floating-point arrays are read as ``dtype``: as float64, what is measured is the recording's own rounding; as float32, how
    large such rounding is.
    """

    slug: str
    name: str
    config: Any
    tensors: dict[str, Tensor]
    rounding: dict[str, float]
    dtype: torch.dtype

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def get(self, key: str) -> Tensor | None:
        return self.tensors.get(key)

    def parameters(self, prefix: str = "") -> dict[str, Tensor]:
        """The recorded parameters whose official names begin with ``prefix``, without it."""
        start = f"param/{prefix}"
        return {key[len(start) :]: tensor for key, tensor in self.tensors.items() if key.startswith(start)}

    def leaf(self, key: str) -> Tensor:
        """A recorded input that collects a gradient."""
        return self[key].clone().requires_grad_()


def load(slug: str, file: Path, dtype: torch.dtype = torch.float64) -> Recording:
    """Read a recording; pickled arrays are refused."""
    meta = json.loads((file.parent / "meta.json").read_text())
    tensors, rounding = {}, {}
    with np.load(file, allow_pickle=False) as arrays:
        for key in arrays.files:
            tensor = codes(arrays[key]) if arrays[key].dtype.kind == "U" else torch.from_numpy(np.array(arrays[key]))
            rounding[key] = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
            tensors[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return Recording(slug, file.stem, meta["case"].get(file.stem, {}), tensors, rounding, dtype)


def codes(texts: Sequence[str] | np.ndarray) -> Tensor:
    """Recorded texts as code points, padded with 0 to the longest."""
    width = max(map(len, texts))
    return torch.tensor([[*map(ord, text), *[0] * (width - len(text))] for text in texts])


def recordings(slug: str) -> list[Recording]:
    """All recordings of a paper in the folder in use."""
    return [load(slug, file) for file in sorted((FOLDER / slug).glob("*.npz"))]


def in_float32(recording: Recording) -> Recording:
    """The same recording, to be computed in float32."""
    return load(recording.slug, FOLDER / recording.slug / f"{recording.name}.npz", torch.float32)


def fill(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Set every parameter of ``module`` from ``values``, reshaped where only the shape differs; nothing may be left over."""
    own = module.state_dict()
    shaped = {name: value.reshape(own[name].shape) if name in own else value for name, value in values.items()}
    module.load_state_dict(shaped, strict=True)


def rows(weights: dict[str, Tensor], name: str, parts: dict[str, int]) -> dict[str, Tensor]:
    """A fused linear layer's weight and bias, cut along the rows into named layers."""
    cut = {}
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" in weights:
            pieces = weights[f"{name}.{kind}"].split(list(parts.values()))
            cut.update({f"{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)})
    return cut


def renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The entries whose names begin with a key of ``names``, with that beginning exchanged."""
    return {
        new + key[len(old) :]: value
        for old, new in names.items()
        for key, value in weights.items()
        if key == old or key.startswith(old + ".")
    }
