"""One mixer layer as it is gated, timed and weighed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.compare.suites import REFERENCE
from attnlab.core.catalog import create_mixer, mixer_info
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid


@dataclass(frozen=True)
class Layer:
    """A mixer with its sizes.

    Args:
        name: as it is registered.
        causal: which form.
        dim: width.
        num_heads: heads.
        batch_size: sequences at once.
        options: its own options.
        device: where it runs: "cpu", "cuda".
    """

    name: str
    causal: bool
    dim: int
    num_heads: int
    batch_size: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def baseline(self) -> Layer:
        """Softmax attention of the same size, which runs PyTorch's fused kernel (SDPA)."""
        return replace(self, name=REFERENCE, options={})


def can_be_causal(name: str) -> bool:
    """Whether the mixer has a causal form."""
    return mixer_info(name).supports.causal != "no"


def can_stream(layer: Layer) -> bool:
    """Whether the layer reads token by token."""
    return layer.causal and mixer_info(layer.name).supports.streaming


def build_layer(layer: Layer, tokens: int, seed: int = 0) -> Mixer:
    """The mixer, initialised from ``seed``, for ``tokens`` where an option says how many; torch's generator is left alone."""
    info = mixer_info(layer.name)
    option = info.supports.tokens_option
    fixed = {} if option is None else {option: tokens}
    if any(o.name == "max_length" and isinstance(o.default, int) and o.default < tokens for o in info.options):
        fixed["max_length"] = tokens
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mixer = create_mixer(layer.name, layer.dim, layer.num_heads, causal=layer.causal, **{**layer.options, **fixed})
    return mixer.to(layer.device)


def random_input(layer: Layer, tokens: int, seed: int = 0) -> tuple[Float[Tensor, "b n c"], Grid | None]:
    """Normal tokens, and the grid that the mixer needs for them: none where it takes sequences, else the squarest."""
    x = torch.randn(layer.batch_size, tokens, layer.dim, generator=torch.Generator().manual_seed(seed)).to(layer.device)
    ranks = mixer_info(layer.name).supports.grid
    if 1 in ranks:
        return x, None
    side = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    grid = (side, tokens // side)
    return x, grid if 2 in ranks else (1, *grid)
