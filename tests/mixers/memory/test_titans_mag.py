from __future__ import annotations

import pytest
import torch

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens
from mixers.memory_definition import Store, attend, each_example, persistent_of, product

CASES = [
    {"chunk": 4, "window": 3, "num_persistent": 2},
    {"chunk": 1, "window": 64, "num_persistent": 5, "gate": "sigmoid", "max_step": 0.2},
    {"chunk": 3, "window": 1, "num_persistent": 0, "gate": "tanh", "memory_heads": 2},
]


def definition(mixer, mask=None):
    def example(inputs):
        store, persistent = Store(mixer.store), persistent_of(mixer)
        for p in persistent:
            store.step(p)
        outputs = []
        for t, x in enumerate(inputs):
            window = inputs[max(t - mixer.attention.window + 1, 0) : t + 1]
            y = attend(mixer.attention, mixer.num_heads, x, persistent + window)
            outputs.append(mixer.out_proj.weight @ product(mixer.product, y, torch.cat(store.step(x))))
        return outputs

    return lambda x: each_example(example, x, mask)


@pytest.mark.tier("T2", "mixer:titans_mag")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_the_recurrence(options):
    mixer = build("titans_mag", **options)
    assert_defined_by(mixer, definition(mixer), tokens())


@pytest.mark.tier("T2", "mixer:titans_mag")
def test_masked_tokens_are_as_if_they_were_not_there():
    mixer = build("titans_mag", **CASES[0])
    mask = torch.tensor([[True, False, True, True, False, False, True, True, True], [False] * 2 + [True] * 5 + [False, True]])
    assert_defined_by(mixer, definition(mixer, mask), tokens(), mask=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: expected at least 1"),
        ({"num_persistent": -1}, "num_persistent: expected at least 0"),
        ({"gate": "relu"}, "gate: expected one of"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("titans_mag", 8, 2, **options)
