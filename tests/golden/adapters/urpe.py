"""URPE: softmax attention whose map is multiplied by a learned matrix of offsets, with and without that matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed

PROVES = ("position:urpe",)

_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _options(recording: Recording) -> dict[str, object]:
    """The position's options; the numbers of log buckets are those of the authors' defaults unless the configuration says."""
    config = recording.config
    if config["unique_buckets"]:
        return {"buckets": "unique", "max_distance": max(config["N"] - 1, 1)}
    return {"buckets": "log", "num_buckets": config.get("rp_bucket", 32), "max_distance": config.get("max_rp", 128)}


def run(recording: Recording) -> dict[str, Tensor]:
    config, weights, bucket = recording.config, recording.parameters(), recording["in/bucket"]
    mixer = create_mixer(
        "softmax", config["D"], config["H"], qkv_bias=True, position="urpe", position_options=_options(recording)
    ).to(recording.dtype)
    n = bucket.shape[0]
    # Each offset's recorded bucket, where ours has its row.
    offsets = torch.arange(1 - n, n)
    recorded = torch.stack([bucket[max(-r, 0), max(r, 0)] for r in offsets.tolist()])
    rows, values = mixer.position.rows(offsets), renamed(weights, {name: name for name in _LAYERS})
    for theirs, ours in (("rp_bias", "shift"), ("ur_rp_bias", "weight")):
        table = torch.zeros_like(getattr(mixer.position, ours))
        table[:, rows] = weights[f"{theirs}.weight"][recorded].T
        values[f"position.{ours}"] = table
    fill(mixer, values)
    x = recording.leaf("in/x")
    # The authors compute what padded queries give, too: the mask of keys is given as one of pairs.
    allowed = ~recording["in/key_padding_mask"][:, None, None, :].expand(-1, 1, n, -1)
    y = mixer(x, pair_mask=allowed)
    (y * recording["in/w"]).sum().backward()
    with torch.no_grad():
        mixer.position.weight.fill_(1.0)
        plain = mixer(x, pair_mask=allowed)
    return {"out/y": y, "grad/x": x.grad, "out/y_without_urpe": plain}
