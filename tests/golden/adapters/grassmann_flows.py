"""Causal Grassmann mixing, as a public reproduction has it."""

from __future__ import annotations

from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:grassmann",)


def run(recording: Recording) -> dict[str, Tensor]:
    weights, config = recording.parameters(), recording.config
    rank, dim = weights["W_red.weight"].shape
    mixer = create_mixer("grassmann", dim, reduced_dim=rank, offsets=config["windows"]).to(recording.dtype)
    names = {"W_red": "reduce", "W_plu": "encode", "W_gate": "gate", "layer_norm": "norm"}
    values = renamed(weights, names)
    if "plucker.idx_i" in weights:  # the columns of W_plu in our order of pairs
        pairs = list(zip(weights["plucker.idx_i"].tolist(), weights["plucker.idx_j"].tolist(), strict=True))
        values["encode.weight"] = values["encode.weight"][:, [pairs.index(pair) for pair in sorted(pairs)]]
    fill(mixer, values)
    x = recording.leaf("in/x")
    y = mixer(x)
    (y * recording["in/w"]).sum().backward()
    return {"out/y": y, "grad/x": x.grad}
