from __future__ import annotations

import pytest
import torch

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens
from mixers.memory_definition import Store, attend, convolved, each_example, persistent_of, product

CASES = [
    {"chunk": 2, "segment": 4, "num_persistent": 3},
    {"chunk": 1, "segment": 3, "num_persistent": 1, "gate": "sigmoid", "max_step": 0.2},
    {"chunk": 4, "segment": 3, "num_persistent": 0, "memory_heads": 2},  # chunks across segments
    {"chunk": 64, "segment": 64, "num_persistent": 2, "depth": 1, "conv_size": 0},
]


def definition(mixer, mask=None):
    def example(inputs):
        store, outputs = Store(mixer.store), []
        for start in range(0, len(inputs), mixer.segment):
            segment = inputs[start : start + mixer.segment]
            recalled = []
            for t in range(len(segment)):  # from the memory as the segment before left it
                queries = convolved(mixer.recall, inputs[: start + t + 1])
                recalled.append(torch.cat([head.read(q) for head, q in zip(store.heads, queries, strict=True)]))
            for t, x in enumerate(segment):
                seen = [*persistent_of(mixer), *recalled[: t + 1], *segment[: t + 1]]
                y = attend(mixer, mixer.num_heads, x, seen)
                outputs.append(mixer.out_proj.weight @ product(mixer.product, y, torch.cat(store.step(y))))
        return outputs

    return lambda x: each_example(example, x, mask)


@pytest.mark.tier("T2", "mixer:titans_mac")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_the_recurrence(options):
    mixer = build("titans_mac", **options)
    assert_defined_by(mixer, definition(mixer), tokens())


@pytest.mark.tier("T2", "mixer:titans_mac")
@pytest.mark.parametrize("options", CASES[:3], ids=str)
def test_masked_tokens_are_as_if_they_were_not_there(options):
    mixer = build("titans_mac", **options)
    mask = torch.tensor([[True, False, True, True, False, False, True, True, True], [False] * 2 + [True] * 5 + [False, True]])
    assert_defined_by(mixer, definition(mixer, mask), tokens(), mask=mask)


@pytest.mark.parametrize("splits", [[1] * 9, [2, 1, 6], [5, 4]], ids=str)
def test_pieces_equal_the_whole_with_padding_inside(splits):
    mixer, x = build("titans_mac", **CASES[2]), tokens().detach()
    mask = torch.tensor([[True, False, True, True, False, False, True, True, True], [False] * 2 + [True] * 5 + [False, True]])
    state, outputs = mixer.init_state(2), []
    for piece, seen in zip(x.split(splits, 1), mask.split(splits, 1), strict=True):
        y, state = mixer.extend(piece, state, mask=seen)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), definition(mixer, mask)(x), rtol=1e-9, atol=1e-10)


def test_a_bad_segment_is_named():
    with pytest.raises(ValueError, match="segment: expected at least 1"):
        create_mixer("titans_mac", 8, 2, segment=0)
