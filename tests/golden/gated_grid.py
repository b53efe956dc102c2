"""The layer that RAVLT and MAViT share, from its recorded parameters."""

from __future__ import annotations

from torch import Tensor

from attnlab import Mixer, create_mixer
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.ops.attention import attention
from golden.recording import fill, renamed, rows

_PARTS = ("q_proj", "k_proj", "v_proj", "gate_proj")


def mixer_of(name: str, weights: dict[str, Tensor], config: dict) -> Mixer:
    """``name`` with the parameters of the recording."""
    dim = config["dim"]
    bias = "qkvo.bias" in weights
    mixer = create_mixer(name, dim, config["num_heads"], qkv_bias=bias, local_kernel=weights["lepe.weight"].shape[-1])
    values = rows(weights, "qkvo", dict.fromkeys(_PARTS, dim))
    fill(mixer.to(weights["qkvo.weight"].dtype), values | renamed(weights, {"lepe": "lepe.conv", "proj": "out_proj"}))
    return mixer


def softmax_with(mixer: Mixer, x: Tensor, grid: Grid) -> Tensor:
    """Softmax attention on turned queries and keys, with the mixer's convolution, gate and projections."""
    q, k, v = mixer.project(x)
    heads = attention(mixer.rotary(q, grid), mixer.rotary(k, grid), v)
    return mixer.join(heads + mixer.local(x, v, Masks(), grid), x, None)
