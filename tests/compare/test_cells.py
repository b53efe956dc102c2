"""Keys of cells are the same everywhere, and every value that decides a result changes them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from attnlab.compare.cells import Cell, canonical, code_version

SPEC = {
    "mixer": {"name": "softmax", "options": {"num_kv_heads": 1}},
    "task": {"name": "recall", "options": {"seq_len": 16}, "fingerprint": "ab"},
    "budget": {"steps": 12, "weight_decay": 0.01},
    "learning_rate": 0.003,
    "seed": 0,
    "code": "c0ffee",
}


def test_key_does_not_depend_on_order_or_process():
    turned = {name: SPEC[name] for name in reversed(SPEC)}
    assert Cell("train", turned).key == Cell("train", SPEC).key
    program = f"import json; from attnlab.compare.cells import Cell; print(Cell('train', json.loads({json.dumps(SPEC)!r})).key)"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == Cell("train", SPEC).key


def test_canonical_form_is_fixed():
    assert canonical({"b": 1, "a": [0.003, True, None]}) == '{"a":[0.003,true,null],"b":1}'
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": float("nan")})


@pytest.mark.parametrize(
    "path",
    [
        ("mixer", "name"),
        ("mixer", "options", "num_kv_heads"),
        ("task", "options", "seq_len"),
        ("task", "fingerprint"),
        ("budget", "steps"),
        ("learning_rate",),
        ("seed",),
        ("code",),
    ],
)
def test_every_value_changes_the_key(path):
    changed = json.loads(json.dumps(SPEC))
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = "another" if isinstance(inner[path[-1]], str) else inner[path[-1]] + 1
    assert Cell("train", changed).key != Cell("train", SPEC).key
    assert Cell("test", SPEC).key != Cell("train", SPEC).key


def test_code_version_is_a_hash_of_the_source(monkeypatch, tmp_path):
    import attnlab.core

    found = code_version()
    assert len(found) == 12 and int(found, 16) >= 0
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "a.py").write_text("x = 1")
    monkeypatch.setattr(attnlab.core, "__path__", [str(tmp_path / "core")])
    one = code_version.__wrapped__()
    (tmp_path / "core" / "a.py").write_text("x = 2")
    assert len({found, one, code_version.__wrapped__()}) == 3
