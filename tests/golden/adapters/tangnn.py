"""The forwards of two of TANGNN's files: the main one, and the one with top-m attention inside its layers."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.mixers.parts.neighbor_mean import neighbor_mean
from attnlab.mixers.sparse.top_m import TopMAggregation
from golden.layers import layer_norm, linear
from golden.recording import Recording, fill, rows

PROVES = ("mixer:top_m_aggregation",)


def _sage(weights: dict[str, Tensor], name: str, x: Tensor, neighbors: Tensor) -> Tensor:
    mean = neighbor_mean(x[None, None], neighbors)[0, 0]
    return linear(weights, f"{name}.lin_l", mean) + linear(weights, f"{name}.lin_r", x)


def _mixer(recording: Recording, width: int, probe: Tensor) -> TopMAggregation:
    """The mixer for tokens of this width; the authors put ones for a probe of another one."""
    mixer = create_mixer("top_m_aggregation", width, 1, num_selected=recording.config["m"]).to(recording.dtype)
    with torch.no_grad():
        mixer.probe.copy_(probe.flatten() if probe.numel() == width else torch.ones(width))
    return mixer


def _top(recording: Recording, x: Tensor, probe: Tensor) -> Tensor:
    return x[_mixer(recording, x.shape[-1], probe).select(x[None])[0]]


def _transformer(recording: Recording, weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A post-norm layer over the chosen tokens, which all attend to all."""
    width, heads = x.shape[-1], recording.config["heads"]
    attention = create_mixer("top_m_aggregation", width, heads, num_selected=len(x), qkv_bias=True).to(recording.dtype)
    own = {key[len(f"{name}.multihead_attn.") :]: value for key, value in weights.items() if key.startswith(f"{name}.multihead")}
    packed = {key.replace("in_proj_", "in_proj."): value for key, value in own.items()}
    mapped = rows(packed, "in_proj", {"q_proj": width, "k_proj": width, "v_proj": width})
    mapped |= {key: value for key, value in own.items() if key.startswith("out_proj")}
    fill(attention, mapped | {"probe": torch.ones(width, dtype=recording.dtype)})
    x = layer_norm(weights, f"{name}.layer_norm1", x + attention(x[None])[0])
    forward = linear(weights, f"{name}.feed_forward.2", linear(weights, f"{name}.feed_forward.0", x).relu())
    return layer_norm(weights, f"{name}.layer_norm2", x + forward)


def _main(recording: Recording, x: Tensor, neighbors: Tensor) -> Tensor:
    weights = recording.parameters("tangnn.")
    for layer in range(recording.config["layers"]):
        name, adjust = f"graphsage_layers.{layer}", f"dimension_adjustments.{layer}"
        local = _sage(weights, f"{name}.conv2", _sage(weights, f"{name}.conv1", x, neighbors).relu(), neighbors).relu()
        chosen = _top(recording, x, weights["a"])
        chosen = linear(weights, f"{adjust}.fc2", linear(weights, f"{adjust}.fc1", chosen).relu()).relu()
        x = torch.cat((local, chosen[torch.arange(len(x)) % len(chosen)]), dim=-1)
    return linear(weights, "mlp.2", linear(weights, "mlp.0", x).relu()).log_softmax(-1)


def _inside(recording: Recording, x: Tensor, neighbors: Tensor) -> Tensor:
    weights = recording.parameters("tai.")
    for layer in range(recording.config["layers"]):
        name = f"graphsage_layers.{layer}"
        local = _sage(weights, f"{name}.conv2", _sage(weights, f"{name}.conv1", x, neighbors).relu(), neighbors)
        local = local.log_softmax(-1)
        summary = _transformer(recording, weights, f"transformer_layers.{layer}.layers.0", _top(recording, local, weights["a"]))
        x = torch.cat((local, summary.mean(0).expand(len(x), -1)), dim=-1)
    return linear(weights, "final_lin", x).log_softmax(-1)


def run(recording: Recording) -> dict[str, Tensor]:
    """Both files."""
    source, target = recording["in/edge_index"]
    n = len(recording["in/x"])
    neighbors = torch.zeros(1, 1, n, n, dtype=torch.bool)
    neighbors[0, 0, target, source] = True
    results = {}
    for name, forward, gradient in (("tangnn", _main, "x"), ("tai", _inside, "x_tai")):
        x = recording.leaf("in/x")
        y = forward(recording, x, neighbors)
        (y * recording["in/w"]).sum().backward()
        results |= {f"out/{name}_logp": y, f"grad/{gradient}": x.grad}
    return results | {"out/top_m_features_layer0": _top(recording, recording["in/x"], recording["param/tangnn.a"])}
