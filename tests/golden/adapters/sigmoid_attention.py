"""Sigmoid attention as a function with its masks, and the module."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.ops.attention import attention
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:sigmoid",)


def _pairs(recording: Recording, config: dict, offset: Tensor, n: int) -> Tensor:
    """(b, 1, n, m): causality and window relative to each example's own last key, as the reference kernel aligns them."""
    m = recording["in/k"].shape[1]
    left, right = next((value for key, value in config.items() if "window" in key and value), (-1, -1))
    if config.get("causal"):
        right = 0
    row = torch.arange(n)[None, :, None] + offset[:, None, None]
    column = torch.arange(m)[None, None, :]
    allowed = torch.ones(offset.shape[0], n, m, dtype=torch.bool)
    if right >= 0:
        allowed &= column <= row + right
    if left >= 0:
        allowed &= column >= row - left
    return allowed[:, None]


def _function(recording: Recording, config: dict) -> dict[str, Tensor]:
    leaves = {name: recording.leaf(f"in/{name}") for name in ("q", "k", "v")}
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves.values())
    b, n, m = q.shape[0], q.shape[2], k.shape[2]
    key_mask = recording.get("in/key_padding_mask")
    if key_mask is not None and not config.get("key_padding", recording.name == "held"):
        key_mask = None
    query_mask = recording.get("in/query_padding_mask")
    # position of the first query among the keys: the last real query stands at the last real key
    offset = torch.full((b,), m) if key_mask is None else key_mask.sum(dim=1)
    offset = offset - (n if query_mask is None else query_mask.sum(dim=1))
    bias = recording["in/sigmoid_bias"].reshape(1, 1, 1, 1)
    slopes = recording.get("in/alibi_slopes")
    if slopes is not None:
        slopes = slopes.reshape(-1, q.shape[1])
        row = torch.arange(n)[None, :, None] + offset[:, None, None]
        distance = (row - torch.arange(m)).abs()[:, None]
        bias = bias - slopes[:, :, None, None] * distance
    options = {"key_mask": key_mask, "pair_mask": _pairs(recording, config, offset, n), "normalizer": "sigmoid"}
    o = attention(q, k, v, bias=bias, **options).transpose(1, 2)
    identity = torch.eye(m, dtype=v.dtype).expand(b, k.shape[1], -1, -1)
    weights = attention(q, k, identity, bias=bias, **options)
    if query_mask is not None:
        o = o.masked_fill(~query_mask[:, :, None, None], 0.0)
    (o * recording["in/w"]).sum().backward()
    results = {"out/o": o, "out/attn": weights} | {f"grad/{name}": leaf.grad for name, leaf in leaves.items()}
    return {key: value for key, value in results.items() if key in recording}


def _module(recording: Recording, config: dict) -> dict[str, Tensor]:
    weights, dim = recording.parameters(), config["dim"]
    temperature = weights.get("attn_temp")
    mixer = create_mixer(
        "sigmoid",
        dim,
        config["num_heads"],
        causal=config.get("causal", False),
        logit_bias=float(weights["attn_bias"]),
        log_temperature=0.0 if temperature is None else float(temperature),
        qk_norm="layer_norm" if "q_norm.weight" in weights else "none",
        position="alibi" if config.get("alibi") else "rotary" if config.get("rope") else "none",
        qkv_bias="qkv.bias" in weights,
        out_bias="proj.bias" in weights,
    ).to(recording.dtype)
    mapped = rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim})
    fill(mixer, mapped | renamed(weights, {"proj": "out_proj", "q_norm": "q_norm", "k_norm": "k_norm"}))
    x = recording.leaf("in/module_x")
    y = mixer(x)
    (y * recording["in/module_w"]).sum().backward()
    return {"out/module_y": y, "grad/module_x": x.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    results = _function(recording, recording.config.get("function", {}))
    if "in/module_x" in recording:
        results |= _module(recording, recording.config["module"])
    return results
