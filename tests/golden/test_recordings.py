"""Our mechanisms against the authors' code, values and gradients, on recorded vectors (tier T3).

``ATTNLAB_GOLDEN=<folder>`` runs the same adapters on another folder of recordings.
"""

from __future__ import annotations

import importlib

import pytest

from golden.recording import FOLDER, Recording, recordings

# slug of the paper: what its recordings establish
ADAPTERS = {
    "agent-attention": ("mixer:agent",),
    "deltanet": ("mixer:delta_net",),
    "lightning-attention-2": ("mixer:lightning",),
    "transnormer-lightning": ("mixer:transnormer",),
    "mamba": ("mixer:mamba",),
    "moh": ("mixer:moh",),
    "sigmoid-attention": ("mixer:sigmoid",),
    "davit": ("mixer:channel_group", "mixer:window"),
    "focalnet": ("mixer:focal_modulation",),
    "metaformer-poolformer": ("mixer:pooling",),
}
CASES = [
    pytest.param(recording, id=f"{slug}/{recording.name}", marks=pytest.mark.tier("T3", *names))
    for slug, names in ADAPTERS.items()
    for recording in recordings(slug)
]


def test_there_are_recordings() -> None:
    assert CASES, f"no recording of {sorted(ADAPTERS)} in {FOLDER}"


@pytest.mark.parametrize("recording", CASES)
def test_equals_the_authors(recording: Recording, record_property: pytest.RecordProperty) -> None:
    adapter = importlib.import_module(f"golden.adapters.{recording.slug.replace('-', '_')}")
    results = adapter.run(recording)
    compared = 0
    for key, ours in results.items():
        theirs = recording[key]
        assert ours.shape == theirs.shape, f"{key}: shape {tuple(ours.shape)}, recorded {tuple(theirs.shape)}"
        error = float((ours.detach() - theirs).norm() / theirs.norm().clamp(min=1e-30))
        assert error <= max(1e-6, recording.rounding[key]), f"{key}: relative error {error:.2e}"
        compared += 1
    missing = {key for key in recording.tensors if key.startswith(("out/", "grad/"))} - set(results)
    assert not missing, f"recorded, but not compared: {sorted(missing)}"
    record_property("checks", compared)
