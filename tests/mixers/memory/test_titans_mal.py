from __future__ import annotations

import pytest
import torch

from mixers.definition import assert_defined_by, build, tokens
from mixers.memory_definition import Store, attend, each_example, layer, persistent_of

CASES = [
    {"chunk": 4, "window": 3, "num_persistent": 2},
    {"chunk": 1, "window": 4, "num_persistent": 6, "max_step": 0.2},
    {"chunk": 5, "window": 64, "num_persistent": 3, "memory_heads": 2},
    {"chunk": 3, "window": 1, "num_persistent": 0},
]


def definition(mixer, mask=None):
    def example(inputs):
        store = Store(mixer.store)
        read = [layer(mixer, store, p) for p in persistent_of(mixer)]
        outputs = []
        for x in inputs:
            read.append(layer(mixer, store, x))
            y = attend(mixer.attention, mixer.num_heads, read[-1], read[-mixer.attention.window :])
            outputs.append(mixer.attention_proj.weight @ y)
        return outputs

    return lambda x: each_example(example, x, mask)


@pytest.mark.tier("T2", "mixer:titans_mal")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_the_recurrence(options):
    mixer = build("titans_mal", **options)
    assert_defined_by(mixer, definition(mixer), tokens())


@pytest.mark.tier("T2", "mixer:titans_mal")
def test_masked_tokens_are_as_if_they_were_not_there():
    mixer = build("titans_mal", **CASES[0])
    mask = torch.tensor([[True, False, True, True, False, False, True, True, True], [False] * 2 + [True] * 5 + [False, True]])
    assert_defined_by(mixer, definition(mixer, mask), tokens(), mask=mask)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_token_by_token_equals_the_whole(options):
    mixer, x = build("titans_mal", **options), tokens().detach()
    state, outputs = mixer.init_state(2), []
    for piece in x.split(1, 1):
        y, state = mixer.extend(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x), rtol=1e-9, atol=1e-10)
