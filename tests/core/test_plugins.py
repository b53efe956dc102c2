"""Mixers from a user's file and from installed packages, in registry, cells and suites."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from attnlab import create_mixer, mixer_info
from attnlab.compare import compare
from attnlab.compare.plan import Plan
from attnlab.compare.suites import MixerChoice, Suite, TaskChoice
from attnlab.core.catalog import mixers
from attnlab.core.plugins import foreign_source, load_object
from attnlab.core.registry import Registry

EXAMPLE = Path(__file__).parents[2] / "docs/examples/running_mean.py"


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """The example of the documentation, in a folder of its own; what it registers is forgotten afterwards."""
    path = tmp_path / "running_mean.py"
    shutil.copy(EXAMPLE, path)
    monkeypatch.setattr(mixers, "_entries", dict(mixers._entries))
    monkeypatch.setattr(mixers, "_files", {})
    return f"{path}:RunningMean"


def suite(name):
    small = {"steps": 2, "batch_size": 4, "parameters": 6000, "depth": 1}
    recall = {"seq_len": 16, "num_pairs": 2, "vocab_size": 12, "eval_examples": 8}
    return Suite(
        "tiny", (TaskChoice("recall", recall, small),), (MixerChoice(name),), learning_rates=(0.01,), seeds=1, control=False
    )


def test_a_class_in_a_file_is_a_mixer_by_name(reference):
    assert mixer_info(reference).name == "running_mean"
    assert create_mixer(reference, dim=8).dim == 8
    assert mixers.get(reference).factory is mixers.get("running_mean").factory


def test_it_takes_part_in_a_comparison(reference, tmp_path):
    found = compare(suite(reference), tmp_path / "out", workers=0)
    assert found.ok and found.summary.score("recall", "running_mean").interval is not None


def test_other_workers_find_it_too(reference, tmp_path):
    found = compare(suite(reference), tmp_path / "out", workers=1)
    assert found.ok and found.summary.score("recall", "running_mean").interval is not None


def test_a_changed_file_is_another_cell(reference):
    def key():
        return Plan(suite(reference), {"cpu": "", "cores": 1}).ready([])[0].cell.key

    first = key()
    assert key() == first
    path = Path(reference.rpartition(":")[0])
    path.write_text(path.read_text() + "\n# another version\n")
    assert key() != first
    assert foreign_source(mixers.get("softmax").factory) is None


def test_what_cannot_be_loaded_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file"):
        mixer_info(str(tmp_path / "nothing.py:Mixer"))
    (tmp_path / "plain.py").write_text("class Plain:\n    pass\n")
    with pytest.raises(ValueError, match=r"is not registered as a mixer: expected a decorator"):
        mixer_info(f"{tmp_path / 'plain.py'}:Plain")
    with pytest.raises(ValueError, match=r"no class or function 'Other'; its classes are \['Plain'\]"):
        load_object(f"{tmp_path / 'plain.py'}:Other")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match="running the file raised ZeroDivisionError"):
        load_object(f"{tmp_path / 'broken.py'}:Any")


def test_installed_packages_add_entries(monkeypatch):
    monkeypatch.setattr("attnlab.core.registry._REGISTRIES", {})
    registry: Registry[object] = Registry("plugin_kind", "attnlab.core.plugins_of_others")

    class Point:
        def __init__(self, value):
            self.value = value

        def load(self):
            if self.value == "broken":
                raise ImportError("no")
            registry.register(self.value)(lambda: None)

    monkeypatch.setattr("attnlab.core.registry.pkgutil.walk_packages", lambda *args, **kwargs: [])
    monkeypatch.setattr("attnlab.core.registry.importlib.import_module", lambda name: importlib.metadata)
    monkeypatch.setattr(importlib.metadata, "__path__", [], raising=False)
    points = {"attnlab.core.plugins_of_others": [Point("theirs"), Point("broken")]}
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points[group])
    assert registry.names() == ["theirs"] and list(registry.broken) == ["broken"]
