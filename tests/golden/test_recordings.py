"""Our mechanisms against the authors' code, values and gradients, on recorded vectors (tier T3).

``ATTNLAB_GOLDEN=<folder>`` runs the same adapters on another folder of recordings.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest
import torch

from attnlab.papers.catalog import paper
from golden import adapters
from golden.recording import FOLDER, Recording, in_float32, recordings


def _adapters() -> dict[str, ModuleType]:
    """The adapters by the slug of their paper.

    Each says in ``PROVES`` which entries its recordings establish, and may name in ``LATER`` recordings of what is not here yet.
    """
    names = [module.name for module in pkgutil.iter_modules(adapters.__path__)]
    return {name.replace("_", "-"): importlib.import_module(f"golden.adapters.{name}") for name in names}


ADAPTERS = _adapters()
CASES = [
    pytest.param(recording, id=f"{slug}/{recording.name}", marks=pytest.mark.tier("T3", *adapter.PROVES))
    for slug, adapter in ADAPTERS.items()
    for recording in recordings(slug)
    if recording.name not in getattr(adapter, "LATER", ())
]


def test_there_are_recordings() -> None:
    assert CASES, f"no recording of {sorted(ADAPTERS)} in {FOLDER}"
    assert all(paper(slug).recorded for slug in ADAPTERS)


@pytest.mark.parametrize("recording", CASES)
def test_equals_the_authors(recording: Recording, record_property: pytest.RecordProperty) -> None:
    adapter = ADAPTERS[recording.slug]
    results = adapter.run(recording)
    single = max(recording.rounding.values()) > 1e-10
    rounded = adapter.run(in_float32(recording)) if single else {}
    for key, ours in results.items():
        theirs = recording[key]
        assert ours.shape == theirs.shape, f"{key}: shape {tuple(ours.shape)}, recorded {tuple(theirs.shape)}"
        # What was recorded in float32 carries the rounding of a float32 run, and ours tells how large that is.
        coarse = recording.rounding[key] > 1e-10
        budget = max(1e-6, 4 * _relative(rounded[key].double(), ours)) if coarse else 1e-6
        error = _relative(ours, theirs)
        assert error <= budget, f"{key}: relative error {error:.2e}, allowed {budget:.2e}"
    missing = {key for key in recording.tensors if key.startswith(("out/", "grad/"))} - set(results)
    assert not missing, f"recorded, but not compared: {sorted(missing)}"
    record_property("checks", len(results))


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    # Recorded indices and spikes are whole numbers or truth values, of which there is no norm.
    ours, theirs = (t.detach() if t.is_floating_point() or t.is_complex() else t.double() for t in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
