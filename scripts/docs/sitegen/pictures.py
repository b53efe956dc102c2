"""A picture of what a mixer does with a small seeded input: its mixing matrix, or what it has in place of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from attnlab import Mixer, MixerInfo, create_mixer, mixer_info, record
from sitegen.png import heat_map

DIM, HEADS, SIDE, SHOWN = 32, 4, 6, 4
TOKENS = SIDE * SIDE


@dataclass(frozen=True)
class Picture:
    """One or more maps of a mixer.

    Attributes:
        title: what they show, in a few words.
        caption: how to read them.
        labels: what each map is of.
        files: the PNG files, as many.
        signed: whether any entry is negative.
    """

    title: str
    caption: str
    labels: tuple[str, ...]
    files: tuple[bytes, ...]
    signed: bool


def small_mixer(name: str) -> Mixer:
    """A seeded instance in float64: causal where the mechanism can be, with the registration's own example options."""
    info = mixer_info(name)
    known = {option.name for option in info.options}
    options: dict[str, Any] = {"num_heads": HEADS, "causal": info.supports.causal != "no"}
    options = {key: value for key, value in options.items() if key in known} | dict(info.example)
    if info.supports.tokens_option is not None:
        options[info.supports.tokens_option] = TOKENS
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return create_mixer(name, DIM, **options).double().eval()


def small_input(info: MixerInfo) -> tuple[Float[Tensor, "1 n c"], tuple[int, ...] | None]:
    """Tokens that change slowly along the sequence, or over a square grid where the mixer is not causal and takes one."""
    flat = info.supports.causal != "no" or 2 not in info.supports.grid
    shape = (TOKENS,) if flat else (SIDE, SIDE)
    noise = torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = noise.clone()
    for axis in range(len(shape)):
        x = x + torch.roll(x, 1, dims=axis)
    x = 3.0 * x / x.std()
    return x.reshape(1, TOKENS, DIM), None if flat else shape


def pictures(name: str) -> list[Picture]:
    """The mixing matrix; for a mixer without one, what tokens depend on, and the maps that it records."""
    info, mixer = mixer_info(name), small_mixer(name)
    x, grid = small_input(info)
    where = f"{TOKENS} tokens in order" if grid is None else f"the {TOKENS} tokens of a {SIDE} × {SIDE} grid, row by row"
    form = {"always": "causal", "optional": "causal form", "no": "not causal"}[info.supports.causal]
    if info.supports.mixing_matrix:
        with torch.no_grad():
            maps = mixer.mixing_matrix(x, grid=grid)[0]
        caption = f"Row i holds the weights with which query i reads the values of {where}; {form}, random weights."
        return [_picture("Mixing matrix", caption, maps, "head" if len(maps) == mixer.num_heads else "map")]
    caption = (
        f"Entry (i, j) is the size of the derivative of output i by input j, over {where}; {form}, random weights. "
        "No matrix between tokens multiplies the values."
    )
    found = [_picture("What each token depends on", caption, _influence(mixer, x, grid)[None], "")]
    with torch.no_grad(), record(mixer) as tape:
        mixer(x, grid=grid)
    for item, tensors in tape.items.items():
        if tensors[-1].dim() == 4 and tensors[-1].shape[2] == tensors[-1].shape[3]:
            said = f"What `attnlab.record` collects as `{item}` on the same input."
            found.append(_picture(item.replace("_", " ").capitalize(), said, tensors[-1][0], "group"))
    return found


def _influence(mixer: Mixer, x: Float[Tensor, "1 n c"], grid: tuple[int, ...] | None) -> Float[Tensor, "n n"]:
    """The Frobenius norm of each block of the Jacobian: one copy of the input in a batch for each entry of the output."""
    outputs = x.numel()
    copies = x.expand(outputs, -1, -1).clone().requires_grad_()
    picked = mixer(copies, grid=grid).reshape(outputs, outputs).diagonal().sum()
    (gradient,) = torch.autograd.grad(picked, copies)
    return torch.linalg.vector_norm(gradient.view(TOKENS, DIM, TOKENS, DIM), dim=(1, 3))


def _picture(title: str, caption: str, maps: Float[Tensor, "h n m"], label: str) -> Picture:
    shown: npt.NDArray[np.float64] = maps[:SHOWN].double().numpy()
    labels = tuple(f"{label} {index}".strip() if label else "" for index in range(len(shown)))
    if len(shown) < len(maps):
        caption += f" The first {SHOWN} of {len(maps)}."
    files = tuple(heat_map(values) for values in shown)
    return Picture(title, caption, labels if len(shown) > 1 else ("",), files, bool((shown < 0).any()))
