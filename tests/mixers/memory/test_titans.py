from __future__ import annotations

import pytest
import torch

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens
from mixers.memory_definition import Store, each_example, layer

CASES = [
    {"chunk": 1, "depth": 1, "max_step": 0.5},
    {"chunk": 1, "depth": 2, "max_step": 0.2},
    {"chunk": 4},
    {"chunk": 4, "depth": 3, "expansion": 1.5, "activation": "gelu", "max_step": 0.1},
    {"chunk": 64, "depth": 4, "activation": "tanh", "conv_size": 0},
    {"chunk": 3, "momentum": False, "memory_heads": 1},
    {"chunk": 2, "forgetting": False, "memory_heads": 6, "conv_size": 1},
]


def definition(mixer, mask=None):
    def example(inputs):
        store = Store(mixer.store)
        return [layer(mixer, store, x) for x in inputs]

    return lambda x: each_example(example, x, mask)


@pytest.mark.tier("T2", "mixer:titans")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_the_recurrence(options):
    mixer = build("titans", **options)
    assert_defined_by(mixer, definition(mixer), tokens())


@pytest.mark.tier("T2", "mixer:titans")
def test_masked_tokens_are_as_if_they_were_not_there():
    mixer = build("titans", chunk=3)
    mask = torch.tensor([[True, False, True, True, False, False, True, True, True], [False] * 2 + [True] * 5 + [False, True]])
    assert_defined_by(mixer, definition(mixer, mask), tokens(), mask=mask)


def test_a_stream_whose_examples_are_at_different_places():
    mixer, x = build("titans", chunk=4), tokens(13).detach()
    mask = torch.rand(2, 13, generator=torch.Generator().manual_seed(0)) < 0.6
    whole, state, outputs = definition(mixer, mask)(x), mixer.init_state(2), []
    for piece, seen in zip(x.split((1, 6, 1, 5), 1), mask.split((1, 6, 1, 5), 1), strict=True):
        y, state = mixer.extend(piece, state, mask=seen)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-10)
    assert torch.equal(state["place"], mask.sum(1) % 4)


def test_longer_chunks_are_another_function():
    one, four = build("titans", chunk=1, max_step=0.2), build("titans", chunk=4, max_step=0.2)
    four.load_state_dict(one.state_dict())
    x = tokens()
    assert float((one(x) - four(x)).detach().abs().max()) > 1e-3
    torch.testing.assert_close(one(x)[:, 0], four(x)[:, 0])


def test_every_option_is_seen_by_the_registry():
    assert create_mixer("titans", 8, 2, depth=1, chunk=2, max_step=0.5).store.max_step == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth: expected 1 to 4"),
        ({"depth": 5}, "depth: expected 1 to 4"),
        ({"chunk": 0}, "chunk: expected at least 1"),
        ({"conv_size": -1}, "conv_size: expected at least 0"),
        ({"expansion": 0.01}, "expansion: expected"),
        ({"activation": "relu"}, "activation: expected one of"),
        ({"max_step": 0.0}, "max_step: expected a positive"),
        ({"memory_heads": 5}, "memory_heads: expected a divisor of dim=8"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("titans", 8, 2, **options)


def test_a_long_stream_stays_finite_and_bounded():
    mixer = create_mixer("titans", 16, 2).eval()
    state = mixer.init_state(1)
    size = state.nbytes
    with torch.no_grad():
        for _ in range(3):
            y, state = mixer.extend(torch.randn(1, 1024, 16), state)
    assert torch.isfinite(y).all() and float(y.abs().max()) < 100.0
    assert state.nbytes == size
