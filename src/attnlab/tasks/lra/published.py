"""What was published of Long Range Arena: models, optimisers and results as data, and our model at each published setting."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from attnlab.core.catalog import mixer_info
from attnlab.core.errors import UnknownNameError, nearest
from attnlab.models import count_parameters, create_model

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class PublishedModel:
    """The reference Transformer of one task, and how it was trained.

    Args:
        task: our name of the task.
        vocab_size: token ids.
        num_classes: classes.
        emb: width of the tokens.
        num_heads: heads.
        num_layers: blocks.
        qkv: width of queries, keys and values, all heads together.
        mlp: inner width of the channel mixer, and of the head.
        max_length: tokens an input is padded to.
        pool: "cls" or "mean".
        position: "sinusoidal" (interleaved) or "learned".
        dropout: of embeddings and branches.
        attention_dropout: of attention weights.
        batch_size: examples a step.
        steps: optimiser steps.
        learning_rate: base of the schedule.
        weight_decay: decoupled.
        warmup: steps.
        schedule: "rsqrt" or "cosine_cycle", as `attnlab.training.train` takes them.
        clip: norm to which gradients are clipped, or None.
        betas: of Adam.
        eps: of Adam.
        note: where code and paper differ.
    """

    task: str
    vocab_size: int
    num_classes: int
    emb: int
    num_heads: int
    num_layers: int
    qkv: int
    mlp: int
    max_length: int
    pool: str
    position: str
    dropout: float
    attention_dropout: float
    batch_size: int
    steps: int
    learning_rate: float
    weight_decay: float
    warmup: int
    schedule: str
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-9
    note: str = ""

    @property
    def peak_rate(self) -> float:
        """The highest learning rate of the run; where the warm-up is longer than the run, that of its end."""
        if self.schedule != "rsqrt":
            return self.learning_rate
        return self.learning_rate * min(1.0, self.steps / self.warmup) / math.sqrt(self.warmup)

    def recipe(self) -> dict[str, Any]:
        """The arguments of `attnlab.training.train` for this run; its AdamW has eps 1e-8 and decays matrices alone."""
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate": self.peak_rate,
            "weight_decay": self.weight_decay,
            "warmup": min(1.0, self.warmup / self.steps),
            "schedule": self.schedule,
            "clip": self.clip,
        }


@dataclass(frozen=True)
class PublishedResult:
    """One row of the published table, accuracy in percent.

    Args:
        model: as the table calls it.
        listops: ListOps.
        text: byte-level text classification.
        retrieval: byte-level document matching.
        image: CIFAR-10 pixels.
        pathfinder: Pathfinder at 32x32.
        average: of these five.
        path_x: Path-X; None where there is no number.
        path_x_status: why there is none: "chance" (printed FAIL) or "not reported".
    """

    model: str
    listops: float
    text: float
    retrieval: float
    image: float
    pathfinder: float
    average: float
    path_x: float | None = None
    path_x_status: str = "chance"


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(files("attnlab.tasks.lra").joinpath("published.toml").read_text(encoding="utf-8"))


def published_settings() -> dict[str, PublishedModel]:
    """The published models by name: listops, text, retrieval, image, image_other, pathfinder, path_x."""
    return {name: PublishedModel(**row) for name, row in _data()["models"].items()}


def published_results() -> tuple[PublishedResult, ...]:
    """The published table in its order, later entries of the repository's list at the end."""
    return tuple(PublishedResult(**row) for row in _data()["results"])


def published_attention() -> dict[str, str]:
    """What the published runs gave their mechanisms, in words."""
    return dict(_data()["attention"])


def published_model(
    name: str,
    mixer: str = "softmax",
    *,
    mixer_options: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Our model at a published setting, with ``mixer`` in the place of attention.

    It differs from the published one: no dropout; the mixers' own projections and their biases, of the width of the tokens
    (the image tasks have narrower queries, keys and values); the exact GELU; a linear head, but for matching; averages over
    real tokens alone; and the first token's state in the place of an added CLS token, or, for a mixer that is always causal,
    an average.

    Args:
        name: a key of `published_settings`.
        mixer: a registered mixer.
        mixer_options: its own options.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnknownNameError: for a name that there is not.
    """
    known = published_settings()
    if name not in known:
        hint = nearest(name, known) or f"; known: {', '.join(known)}"
        raise UnknownNameError(f"name: unknown published model {name!r}{hint}")
    setting = known[name]
    first = setting.pool == "cls" and mixer_info(mixer).supports.causal != "always"
    own: dict[str, Any] = {"hidden": setting.mlp} if name == "retrieval" else {"num_classes": setting.num_classes}
    return create_model(
        "matching" if name == "retrieval" else "encoder",
        **own,
        vocab_size=setting.vocab_size,
        dim=setting.emb,
        depth=setting.num_layers,
        mixer=mixer,
        num_heads=setting.num_heads,
        mixer_options=mixer_options,
        channel_options={"hidden": setting.mlp},
        pool="first" if first else "mean",
        position="learned" if setting.position == "learned" else "interleaved_sinusoidal",
        max_length=setting.max_length,
        device=device,
        dtype=dtype,
    )


def within_budget(candidate: nn.Module | int, base: nn.Module | int, slack: float = 0.1) -> bool:
    """The arena's rule for new models: at most a tenth more parameters than the base.

    Args:
        candidate: a model, or its number of parameters.
        base: likewise.
        slack: how much more, as a share.
    """
    sizes = [count_parameters(model) if isinstance(model, nn.Module) else model for model in (candidate, base)]
    return sizes[0] <= (1.0 + slack) * sizes[1]
