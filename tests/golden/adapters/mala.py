"""Magnitude-aware linear attention, and softmax attention with the same parameters, as in the authors' last stages."""

from __future__ import annotations

from torch import Tensor

from golden.adapters import rala
from golden.recording import Recording

PROVES = ("mixer:mala",)


def run(recording: Recording) -> dict[str, Tensor]:
    return rala.run(recording, "mala")
