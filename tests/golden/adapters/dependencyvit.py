"""Reversed attention of a third party's DependencyViT: one layer with the messages of those below it."""

from __future__ import annotations

from torch import Tensor

from attnlab import create_mixer, record
from golden.recording import Recording, fill, renamed, rows

PROVES = ("mixer:reversed",)


def run(recording: Recording) -> dict[str, Tensor]:
    weights = recording.parameters()
    heads, dim = weights["head_selector.weight"].shape
    mixer = create_mixer(
        "reversed", dim, heads, qkv_bias="qkv.bias" in weights, out_bias="proj.bias" in weights, dtype=recording.dtype
    )
    names = {
        "proj": "out_proj",
        "head_selector": "head_selector",
        "message_controller.fc1": "controller_in",
        "message_controller.fc2": "controller_out",
    }
    fill(mixer, rows(weights, "qkv", {"q_proj": dim, "k_proj": dim, "v_proj": dim}) | renamed(weights, names))
    x, before = recording.leaf("in/x"), recording.get("in/m_prev")
    with record(mixer) as tape:
        y, after = mixer.pass_messages(x, None if before is None else before.flatten(1))
    (y * recording["in/w"]).sum().backward()
    results = {
        "out/y": y,
        "out/m": after[:, None, None],
        "out/dependency_mask": tape["dependency_mask"],
        "out/prune_score": tape["prune_score"],
        "grad/x": x.grad,
    }
    return {key: value for key, value in results.items() if key in recording}
