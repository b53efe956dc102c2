"""The state of a streaming mixer as a container."""

from __future__ import annotations

import pytest
import torch

from attnlab import State


def _state() -> State:
    return State({"a": torch.randn(3, 2), "real": torch.tensor([[True], [False], [True]]), "position": torch.arange(3)})


def test_select_reorders_every_tensor() -> None:
    state = _state()
    picked = state.select(torch.tensor([2, 0, 2]))
    assert torch.equal(picked["a"], state["a"][[2, 0, 2]])
    assert picked["position"].tolist() == [2, 0, 2]


def test_save_and_load(tmp_path) -> None:
    state = _state()
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_to_changes_floating_tensors_alone() -> None:
    moved = _state().to(dtype=torch.float64)
    assert moved["a"].dtype == torch.float64
    assert moved["real"].dtype == torch.bool
    assert moved["position"].dtype == torch.int64


def test_parts_nest() -> None:
    inner = _state()
    outer = State(inner.prefixed("blocks.0/") | inner.prefixed("blocks.1/"))
    assert set(outer.part("blocks.1/")) == set(inner)
    assert outer.nbytes == 2 * inner.nbytes


def test_one_batch_size() -> None:
    with pytest.raises(ValueError, match="one batch size"):
        State({"a": torch.zeros(2), "b": torch.zeros(3)})
