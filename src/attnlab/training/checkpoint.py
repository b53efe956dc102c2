"""Checkpoints: one safetensors file, tensors in its body and everything else as JSON in its header; nothing is unpickled."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Path_ = str | os.PathLike[str]


def save(path: Path_, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint; the file appears whole under its name, or the old one stays.

    Args:
        path: the file; its folder is made if it is not there.
        tensors: names to tensors, from any device.
        facts: what JSON can hold.
    """
    from safetensors.torch import save_file

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=target.name, suffix=".part", dir=target.parent)
    os.close(handle)
    try:
        apart = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        save_file(apart, part, metadata={"attnlab": json.dumps(facts)})
        os.replace(part, target)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def load(path: Path_) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and facts of what `save` wrote.

    Raises:
        ValueError: if the file is no checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            facts = (file.metadata() or {}).get("attnlab")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {os.fspath(path)!r} is not a safetensors file: {error}") from error
    if facts is None:
        raise ValueError(f"checkpoint: {os.fspath(path)!r} was not written by attnlab.training")
    return tensors, json.loads(facts)


def pack(model: nn.Module, optimizer: torch.optim.Optimizer, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Everything that changes in training, by name; ``states`` are those of each process's generators."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()})
    for rank, own in enumerate(states):
        tensors.update({f"generator.{rank}.{name}": state for name, state in own.items()})
    return tensors


def unpack(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    rank: int = 0,
) -> None:
    """Put back what `pack` gave; of generators, those of one process.

    Raises:
        ValueError: if the generators differ from those saved.
        RuntimeError: from torch, if the model's parameters do.
    """
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    saved = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**saved, "state": state})
    prefix = f"generator.{rank}."
    found = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    if found != set(generators):
        raise ValueError(f"checkpoint: expected the generators {sorted(generators)}, got {sorted(found)}")
    for name, generator in generators.items():
        generator.set_state(tensors[prefix + name])
