"""The decayed linear attention op with and without decay, its states, and the slopes."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.mixers.parts.decay import log_decay
from attnlab.ops.linear_attention import linear_attention
from golden.recording import Recording

PROVES = ("mixer:lightning",)


def run(recording: Recording) -> dict[str, Tensor]:
    heads = recording["in/q"].shape[1]
    decay = -recording["in/slopes"].reshape(-1)
    ours = log_decay("alibi", heads)
    torch.testing.assert_close(ours.to(decay), decay, rtol=1e-6, atol=0.0)
    leaves = {name: recording.leaf(f"in/{name}") for name in ("q", "k", "v")}
    o, state = linear_attention(**leaves, log_decay=decay)
    (o * recording["in/w"]).sum().backward()
    results = {"out/o_decay": o, "out/final_state": state}
    results |= {f"grad/{name}": leaf.grad for name, leaf in leaves.items()}
    results["out/o_no_decay"] = linear_attention(**leaves)[0]
    if "in/initial_state" in recording:
        o, state = linear_attention(**leaves, log_decay=decay, initial_state=recording["in/initial_state"])
        results |= {"out/o_with_initial_state": o, "out/final_state_with_initial_state": state}
    return {key: value for key, value in results.items() if key in recording}
