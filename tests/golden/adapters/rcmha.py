"""RCMHA: relative scores after depthwise convolutions, causal or over all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:rcmha",)


def run(recording: Recording) -> dict[str, Tensor]:
    weights = recording.parameters()
    heads, width = recording.config["heads"], recording.config["d_model"]
    reach = weights["key_pos_bias"].shape[0] // 2
    taps = weights["query.1.conv.weight"].shape[-1]
    # Their tables run from -reach to reach - 1, ours to both sides alike; no pair of the recording is `reach` apart.
    allowed = recording["in/mask"][:, :, 0] > 0
    causal = not bool(allowed.all())
    if causal and not torch.equal(allowed, allowed.new_ones(allowed.shape).tril()):
        raise ValueError("in/mask: expected all pairs or the causal ones")
    mixer = create_mixer("rcmha", width, heads, causal=causal, conv_size=taps, max_distance=reach - 1).to(recording.dtype)
    names = {"query.0.linear": "q_proj", "key.0.linear": "k_proj", "value.0.linear": "v_proj", "output": "out_proj"}
    names |= {f"{long}.1.conv": f"convs.{short}" for long, short in (("query", "q"), ("key", "k"), ("value", "v"))}
    names |= {"query_pos_bias": "query_bias"}
    tables = {
        "position.table": weights["key_pos_embeddings"][1:].transpose(0, 1),
        "position.scalars": weights["key_pos_bias"][1:].T,
    }
    fill(mixer, renamed(weights, names) | tables)
    x = recording.leaf("in/x")
    tokens = x.transpose(0, 1)
    y = mixer(tokens).transpose(0, 1)
    (y * recording["in/w"]).sum().backward()
    matrix = mixer.mixing_matrix(tokens)
    return {"out/y": y, "out/attn": matrix.permute(2, 3, 0, 1), "grad/x": x.grad}
