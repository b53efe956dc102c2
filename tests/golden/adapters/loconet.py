"""LoCoNet's convolution over speakers, its attention along time, and its attention between sound and sight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import Tokens, create_mixer
from attnlab.models.block import Block
from golden.layers import layer_norm, linear
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:short_context", "mixer:group_axes", "mixer:softmax")


def attention_weights(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of torch's attention as those of ours."""
    found = renamed(weights, {f"{name}.out_proj": "out_proj"})
    for kind in ("weight", "bias"):
        parts = weights[f"{name}.in_proj_{kind}"].chunk(3)
        found |= {f"{part}_proj.{kind}": values for part, values in zip("qkv", parts, strict=True)}
    return found


def _feed_forward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The layer's second half, with its norm behind."""
    return layer_norm(weights, "norm2", x + linear(weights, "linear2", F.relu(linear(weights, "linear1", x))))


def _cross(recording: Recording, *, adjust: bool) -> Tensor:
    """Attention whose queries are those of the other stream, or (adjusted) of the stream that the residual is of."""
    weights, dim = recording.parameters("cross."), recording.config["dim"]
    mixer = create_mixer("softmax", dim, recording.config["heads"], qkv_bias=True).to(recording.dtype)
    fill(mixer, attention_weights(weights, "self_attn"))
    x, audio = recording["in/x"], recording["in/audio"]
    mixed = mixer(x, context=audio) if adjust else mixer(audio, context=x)
    return _feed_forward(weights, layer_norm(weights, "norm1", x + mixed))


def run(recording: Recording) -> dict[str, Tensor]:
    config = recording.config
    batch, entities, dim = int(recording["in/B"]), int(recording["in/S"]), config["dim"]
    conv, att = recording.parameters("conv."), recording.parameters("att.")
    x = recording["in/x"]
    grid = (entities, x.shape[1])
    kernel, hidden = conv["conv2d.weight"].shape[-1], len(conv["conv2d_1x1.weight"])
    near = create_mixer("short_context", dim, entities=entities, kernel_size=kernel, hidden=hidden)
    far = create_mixer("group_axes", dim, config["heads"], axis=1, qkv_bias=True)
    short = Block(dim, near, norm="none").to(recording.dtype)
    long = Block(dim, far, placement="post").to(recording.dtype)
    fill(near, renamed(conv, {"conv2d": "conv", "ln": "norm", "conv2d_1x1": "up", "conv2d_1x1_2": "down"}))
    fill(long, {f"mixer.{k}": v for k, v in attention_weights(att, "self_attn").items()} | renamed(att, {"norm1": "mixer_norm"}))
    with torch.no_grad():
        after = short(Tokens(x.reshape(batch, -1, dim), grid=grid))
        both = _feed_forward(att, long(after).x)
        return {
            "out/sim_conv": after.x.reshape(x.shape),
            "out/sim_then_lim": both.reshape(x.shape),
            "out/cross": _cross(recording, adjust=False),
            "out/cross_adjust": _cross(recording, adjust=True),
        }
