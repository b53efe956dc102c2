"""CrossFormer's two blocks: attention in adjacent groups and in groups at an interval, with the dynamic position bias."""

from __future__ import annotations

import re

from torch import Tensor

from attnlab import Mixer, create_mixer
from golden.layers import layer_norm, mlp
from golden.recording import Recording, fill, renamed, rows

PROVES = ("position:dynamic_mlp", "mixer:long_short_distance")
LATER = {"backbone"}  # a whole network; named models are not here yet

_CTOR = re.compile(r"CrossFormerBlock\((\d+),\((\d+),(\d+)\),(\d+) heads,group_size=(\d+),interval=(\d+)")
_MLP = {
    "pos_proj": "mlp.0",
    "pos1.0": "mlp.1",
    "pos1.2": "mlp.3",
    "pos2.0": "mlp.4",
    "pos2.2": "mlp.6",
    "pos3.0": "mlp.7",
    "pos3.2": "mlp.9",
}


def _mixer(weights: dict[str, Tensor], dim: int, heads: int, distance: str, size: int, interval: int) -> Mixer:
    """The attention of a block."""
    hidden = weights["pos.pos_proj.weight"].shape[0]
    mixer = create_mixer(
        "long_short_distance",
        dim,
        heads,
        distance=distance,
        group=size,
        interval=interval,
        qkv_bias="qkv.bias" in weights,
        position="dynamic_mlp",
        position_options={"rank": 2, "hidden": hidden},
    ).to(weights["proj.weight"].dtype)
    values = rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim}) | renamed(weights, {"proj": "out_proj"})
    fill(mixer, values | renamed(weights, {f"pos.{old}": f"position.{new}" for old, new in _MLP.items()}))
    return mixer


def run(recording: Recording) -> dict[str, Tensor]:
    _, height, width, heads, size, interval = map(int, _CTOR.match(recording.config["ctor"]).groups())
    grid = (height, width)
    weights = {name: recording.parameters(f"{name}.") for name in ("sda", "lda")}

    def block(name: str, x: Tensor) -> Tensor:
        own = weights[name]
        attention = {key[len("attn.") :]: value for key, value in own.items() if key.startswith("attn.")}
        distance = "short" if name == "sda" else "long"
        mixer = _mixer(attention, x.shape[-1], heads, distance, size, interval)
        x = x + mixer(layer_norm(own, "norm1", x), grid=grid)
        return x + mlp(own, "mlp", layer_norm(own, "norm2", x))

    x = recording.leaf("in/x")
    near = block("sda", x)
    pair = block("lda", near)
    (pair * recording["in/w"]).sum().backward()
    return {"out/y_pair": pair, "out/y_sda": near, "out/y_lda": block("lda", x), "grad/x": x.grad}
