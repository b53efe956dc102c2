"""Cascaded group attention, alone and in EfficientViT's sandwich of convolutions and feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn

from attnlab import create_mixer
from attnlab.core.grid import from_grid, to_grid
from attnlab.mixers.parts.conv_bn import ConvBN
from golden.conv_bn import conv_bn
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:cascaded_group", "position:absolute_offsets")

_MIXER = {"qkvs": "qkvs", "dws": "q_convs", "attention_biases": "position.table", "proj.1": "out_proj"}


def _mixer(config: dict, weights: dict[str, Tensor]) -> nn.Module:
    heads, resolution = config["num_heads"], config["resolution"]
    mixer = create_mixer(
        "cascaded_group",
        config["dim"],
        heads,
        key_dim=config["key_dim"],
        kernels=tuple(config["kernels"][:heads]),
        window=min(config.get("window_resolution", resolution), resolution),
        border="zero_tokens",
    ).to(weights["attention_biases"].dtype)
    # The official table lists the offsets in the order of their first appearance, which is row-major.
    fill(mixer, renamed(conv_bn(weights), _MIXER))
    return mixer.eval()


def _part(weights: dict[str, Tensor]) -> ConvBN:
    """A `ConvBN` of the recorded sizes; one weight a channel is a depthwise convolution."""
    weight = weights["conv.weight"]
    out, inside, side, _ = weight.shape
    groups = out if inside == 1 else 1
    part = ConvBN(inside * groups, out, side, groups=groups).to(weight.dtype)
    fill(part, conv_bn(weights))
    return part.eval()


def _block(recording: Recording, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    def sandwich(x: Tensor, index: int) -> Tensor:
        x = x + _part(recording.parameters(f"dw{index}.m."))(x, grid)
        up, down = (_part(recording.parameters(f"ffn{index}.m.{name}.")) for name in ("pw1", "pw2"))
        return x + down(up(x, grid).relu(), grid)

    x = sandwich(x, 0)
    x = x + _mixer(recording.config, recording.parameters("mixer.m.attn."))(x, grid=grid)
    return sandwich(x, 1)


def run(recording: Recording) -> dict[str, Tensor]:
    image = recording.leaf("in/x")
    grid, x = tuple(image.shape[2:]), from_grid(image)
    if recording.config.get("cls") == "EfficientVitBlock":
        y = _block(recording, x, grid)
    else:
        y = _mixer(recording.config, recording.parameters())(x, grid=grid)
    y = to_grid(y, grid)
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "grad/x": image.grad}
