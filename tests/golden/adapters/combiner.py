"""Combiner's patterns around dense projections, recorded from a transcription of the authors' code."""

from __future__ import annotations

from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill

PROVES = ("mixer:combiner",)
KINDS = {"fixed": "fixed", "rowmajor": "axial", "mixture": "mixture"}
NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    kind, _, form = config["kind"].partition("_")
    activation, _, reduction = config.get("summary", "identity-max").partition("-")
    weights = recording.parameters(f"{name}.")
    mixer = create_mixer(
        "combiner",
        config["dim"],
        config["heads"],
        pattern=KINDS[kind],
        segment=config["seg"],
        causal=config.get("causal", form in ("causal", "unidir")),
        activation=activation,
        reduction=reduction,
        row_summary=config.get("row_summary", "none"),
        qkv_bias=True,
    ).to(recording.dtype)
    # recorded as x @ W
    fill(mixer, {f"{NAMES[key[0]]}{key[1:]}": value.T if key.endswith("weight") else value for key, value in weights.items()})
    x = recording.leaf(f"in/{name}.x")
    y = mixer(x)
    (y * recording[f"in/{name}.w"]).sum().backward()
    return {f"out/{name}.y": y, f"grad/{name}.x": x.grad}


def run(recording: Recording) -> dict[str, Tensor]:
    """Every recorded configuration."""
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
