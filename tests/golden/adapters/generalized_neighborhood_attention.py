"""NATTEN's operators with strides, dilations and causal axes in one, two and three dimensions."""

from __future__ import annotations

from torch import Tensor

from golden.neighborhoods import run_operator
from golden.recording import Recording

PROVES = ("mixer:neighborhood",)


def run(recording: Recording) -> dict[str, Tensor]:
    """Every recorded configuration."""
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= run_operator(recording, name, config)
    return results
