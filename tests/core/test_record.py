"""Recording what happens inside a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnlab import create_mixer, record


def test_names_are_paths_and_only_selects() -> None:
    model = nn.Sequential(create_mixer("softmax", 8, 2), create_mixer("softmax", 8, 2))
    x = torch.randn(1, 5, 8)
    with record(model, only=["attention"]) as tape:
        model(x)
    assert set(tape.items) == {"0/attention", "1/attention"}
    torch.testing.assert_close(tape["0/attention"], model[0].mixing_matrix(x))
    torch.testing.assert_close(tape["0/attention"].sum(-1), torch.ones(1, 2, 5))
    with pytest.raises(KeyError, match="was not recorded"):
        tape["2/attention"]


def test_other_models_are_passed_over_and_closing_ends_it() -> None:
    watched, other = create_mixer("softmax", 8, 2), create_mixer("softmax", 8, 2)
    x = torch.randn(1, 3, 8)
    with record(watched, detach=True) as tape:
        other(x)
        watched(x)
    count = len(tape.items["mixed"])
    watched(x)
    assert count == len(tape.items["mixed"]) == 1
    assert not tape["mixed"].requires_grad
