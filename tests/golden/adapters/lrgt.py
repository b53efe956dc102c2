"""Long-range grouping attention, and the attention of merged tokens over all tokens with a score of each key."""

from __future__ import annotations

import math

from torch import Tensor

from attnlab import create_mixer
from attnlab.core.masks import Masks
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:long_range_grouping", "mixer:softmax")

NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "proj": "out_proj", "IFS": "signature"}


def _grouping(recording: Recording) -> dict[str, Tensor]:
    config, weights = recording.config, recording.parameters()
    x = recording.leaf("in/x")
    views, side = int(recording["in/view_num"]), math.isqrt(x.shape[1])
    signature, bias = "IFS.weight" in weights, "to_q.bias" in weights
    # Without groups the tokens of each view attend to each other: a lattice of all of them, a view at a time.
    options = {"interval": config["patch_group"] if config["lga"] else 1, "signature": signature, "qkv_bias": bias}
    mixer = create_mixer("long_range_grouping", config["dim"], config["num_heads"], **options).to(recording.dtype)
    fill(mixer, renamed(weights, NAMES))
    if config["lga"]:
        y = mixer(x.unflatten(0, (-1, views)).flatten(1, 2), grid=(views, side, side)).reshape(x.shape)
    else:
        y = mixer(x, grid=(side, side))
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "grad/x": x.grad}


def _merged(recording: Recording) -> dict[str, Tensor]:
    config, weights = recording.config, recording.parameters()
    mixer = create_mixer("softmax", config["dim"], config["num_heads"], qkv_bias="to_q.bias" in weights).to(recording.dtype)
    fill(mixer, renamed(weights, NAMES))
    queries, context, score = (recording.leaf(f"in/{name}") for name in ("q", "kv", "token_score"))
    q, k, v = mixer.project(queries, context)
    y = mixer.join(mixer.dense(q, k, v, Masks(), None, bias=score.mT[:, None]), queries, None)
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "grad/q": queries.grad, "grad/kv": context.grad, "grad/token_score": score.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    return _merged(recording) if "in/token_score" in recording else _grouping(recording)
