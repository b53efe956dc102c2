"""The registry: lookup, options, filters, robust discovery."""

from __future__ import annotations

import pytest

from attnlab import UnknownNameError, create_mixer, list_mixers, mixer_info
from attnlab.core.info import Supports, read_options
from attnlab.core.registry import Registry, all_registries


def test_every_module_of_every_room_imports() -> None:
    for kind, registry in all_registries().items():
        registry.names()
        assert registry.broken == {}, f"{kind}: {registry.broken}"


def test_unknown_name_and_option_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'softmax'"):
        create_mixer("sotfmax", dim=8)
    with pytest.raises(UnknownNameError, match="did you mean 'num_kv_heads'"):
        create_mixer("softmax", dim=8, kv_heads=2)


def test_a_broken_module_is_reported_and_harmless(tmp_path, monkeypatch) -> None:
    room = tmp_path / "room_under_test"
    room.mkdir()
    (room / "__init__.py").write_text(
        "from attnlab.core.registry import Registry\nthings = Registry('thing', 'room_under_test')\n"
    )
    (room / "good.py").write_text(
        "from room_under_test import things\n\n\n@things.register('good')\ndef good():\n    '''Good.'''\n"
    )
    (room / "bad.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from room_under_test import things

    assert things.names() == ["good"]
    with pytest.raises(UnknownNameError, match=r"room_under_test\.bad could not be imported"):
        things.get("bad")


def test_a_name_is_taken_once() -> None:
    registry: Registry[object] = Registry("test_kind", "attnlab.core")
    registry.register("a")(lambda: None)

    def other() -> None: ...

    with pytest.raises(ValueError, match="registered already"):
        registry.register("a")(other)


def test_filters_select_by_promise() -> None:
    assert "mamba" in list_mixers(causal=True, streaming=True)
    assert "mamba" not in list_mixers(causal="optional")
    assert "pooling" not in list_mixers(causal=True)
    assert set(list_mixers(grid=2)) >= {"agent", "softmax", "pooling"}
    assert list_mixers("soft*") == ["softmax"]
    with pytest.raises(ValueError, match="filter 'colour'"):
        list_mixers(colour="red")


def test_options_follow_typed_keywords_to_the_base() -> None:
    names = [option.name for option in mixer_info("sigmoid").options]
    assert names[:2] == ["dim", "num_heads"]
    assert {"logit_bias", "position", "dtype"} <= set(names)
    assert len(names) == len(set(names))

    def function(a: int, *, b: float = 2.0) -> None: ...

    assert [(o.name, o.default) for o in read_options(function)] == [("a", ...), ("b", 2.0)]


def test_supports_matches() -> None:
    supports = Supports(causal="optional", grid=frozenset({1, 2}))
    assert supports.matches(causal=True, grid=2)
    assert not supports.matches(causal=False)
    assert not supports.matches(grid=3)
