"""A decoder layer of Group Pose: attention within and across instances, then deformable attention to the image, then an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import Mixer, Tokens, create_mixer
from attnlab.models.block import Block
from golden.layers import layer_norm, linear
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:group_axes",)


def _along(recording: Recording, name: str, axis: int) -> Block:
    """Attention along one axis with its norm behind."""
    weights, config = recording.parameters(), recording.config
    mixer: Mixer = create_mixer("group_axes", config["d_model"], config["n_heads"], axis=axis, qkv_bias=True)
    block = Block(config["d_model"], mixer, placement="post").to(recording.dtype)
    values = renamed(weights, {f"{name}_attn.out_proj": "mixer.out_proj", f"{name}_norm": "mixer_norm"})
    for kind in ("weight", "bias"):
        parts = weights[f"{name}_attn.in_proj_{kind}"].chunk(3)
        values |= {f"mixer.{part}_proj.{kind}": rows for part, rows in zip("qkv", parts, strict=True)}
    fill(block, values)
    return block


def _deformable(recording: Recording, queries: Tensor, references: Tensor, memory: Tensor, shapes: Tensor) -> Tensor:
    """Each query reads the maps around its reference points: (b, q, c), (b, q, levels, 2), (b, m, c), (levels, 2)."""
    weights, heads, points = recording.parameters("cross_attn."), recording.config["n_heads"], recording.config["n_points"]
    levels = len(shapes)
    offsets = linear(weights, "sampling_offsets", queries).unflatten(-1, (heads, levels, points, 2))
    shares = linear(weights, "attention_weights", queries).unflatten(-1, (heads, -1)).softmax(-1).unflatten(-1, (levels, points))
    values = linear(weights, "value_proj", memory).unflatten(-1, (heads, -1))
    places = references[:, :, None, :, None] + offsets / shapes.flip(-1)[:, None].to(offsets.dtype)
    total = torch.zeros((), dtype=queries.dtype)
    sizes = [int(height * width) for height, width in shapes]
    for level, part in enumerate(values.split(sizes, dim=1)):
        maps = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, tuple(shapes[level].tolist()))
        where = 2 * places[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        read = F.grid_sample(maps, where, align_corners=False).unflatten(0, (-1, heads))
        total = total + torch.einsum("bhcqp,bqhp->bqhc", read, shares[:, :, :, level])
    return linear(weights, "output_proj", total.flatten(2))


def run(recording: Recording) -> dict[str, Tensor]:
    weights = recording.parameters()
    pose = recording["in/tgt_pose"]  # (instances, b, slots, c)
    position = F.pad(recording["in/query_pos"], (0, 0, 1, 0))  # none for the instance itself
    grid = (pose.shape[0], pose.shape[2])

    def table(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1, 2)

    def back(x: Tensor) -> Tensor:
        return x.unflatten(1, grid).transpose(0, 1)

    with torch.no_grad():
        within = _along(recording, "within", 1)(Tokens(table(pose + position), grid=grid))
        across = _along(recording, "across", 0)(within)
        x = across.x + table(position)
        points = recording["in/reference_points"].unflatten(-1, (-1, 2)).transpose(2, 3)  # (instances, b, slots, levels, 2)
        memory = recording["in/memory"].transpose(0, 1)
        read = _deformable(recording, x, table(points), memory, recording["in/spatial_shapes"])
        x = layer_norm(weights, "norm1", x + read)
        y = layer_norm(weights, "norm2", x + linear(weights, "linear2", F.relu(linear(weights, "linear1", x))))
    return {"out/after_within": back(within.x), "out/after_across": back(across.x), "out/y": back(y)}
