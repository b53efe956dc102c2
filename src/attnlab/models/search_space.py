"""A space of models whose layers may differ in mixer, heads and width of the channel mixer, as data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LayerChoice:
    """What one layer is.

    Args:
        mixer: a registered mixer.
        num_heads: its heads.
        hidden: inner width of the channel mixer.
    """

    mixer: str
    num_heads: int
    hidden: int


@dataclass(frozen=True)
class Candidate:
    """A point of a `SearchSpace`.

    Args:
        dim: width of the tokens.
        layers: the lowest first.
    """

    dim: int
    layers: tuple[LayerChoice, ...]

    def model_options(self) -> dict[str, Any]:
        """What a model takes: ``create_model("causal_lm", vocab_size=256, **candidate.model_options())``."""
        return {
            "dim": self.dim,
            "depth": len(self.layers),
            "mixer": [layer.mixer for layer in self.layers],
            "mixer_options": [{"num_heads": layer.num_heads} for layer in self.layers],
            "channel_options": [{"hidden": layer.hidden} for layer in self.layers],
        }


@dataclass(frozen=True)
class SearchSpace:
    """All stacks of layers from a few choices each, as in architecture search over efficient Transformers (Liu et al. 2022).

    RECONSTRUCTION: the card of that paper was written from its abstract; sizes are those it names. Encoder and decoder as one
    searched model, and the encoder layers that a decoder sees, are left out.

    Args:
        mixers: registered mixers, of which each layer has one.
        dims: widths of the tokens.
        depths: numbers of layers.
        num_heads: heads of a layer.
        hidden: inner widths of a layer's channel mixer.

    Raises:
        ValueError: if there is nothing to choose from, a choice twice, or a number that is not positive.
    """

    mixers: tuple[str, ...] = ("softmax", "linear")
    dims: tuple[int, ...] = (512, 640)
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    num_heads: tuple[int, ...] = (4, 8)
    hidden: tuple[int, ...] = (1024, 2048, 3072)

    def __post_init__(self) -> None:
        for name in ("mixers", "dims", "depths", "num_heads", "hidden"):
            choices = getattr(self, name)
            if not choices or len(set(choices)) < len(choices):
                raise ValueError(f"{name}: expected choices that differ, got {choices}")
            if name != "mixers" and min(choices) < 1:
                raise ValueError(f"{name}: expected positive integers, got {choices}")

    @property
    def layer_choices(self) -> list[LayerChoice]:
        """What a layer may be."""
        return [LayerChoice(*choice) for choice in itertools.product(self.mixers, self.num_heads, self.hidden)]

    def __len__(self) -> int:
        return len(self.dims) * sum(len(self.layer_choices) ** depth for depth in self.depths)

    def __iter__(self) -> Iterator[Candidate]:
        """All candidates, the smaller depths first within a width."""
        for dim, depth in itertools.product(self.dims, self.depths):
            for layers in itertools.product(self.layer_choices, repeat=depth):
                yield Candidate(dim, layers)

    def sample(self, generator: torch.Generator | None = None) -> Candidate:
        """A candidate whose width, depth and layers are each drawn uniformly, so that small depths are as likely as large."""

        def draw(count: int) -> int:
            device = "cpu" if generator is None else generator.device
            return int(torch.randint(count, (), generator=generator, device=device))

        dim, depth = self.dims[draw(len(self.dims))], self.depths[draw(len(self.depths))]
        choices = self.layer_choices
        return Candidate(dim, tuple(choices[draw(len(choices))] for _ in range(depth)))
