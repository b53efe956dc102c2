"""Packed tokens, and states that grow in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab import State, Tokens, UnsupportedError, create_mixer, pack, unpack
from attnlab.models import create_model


def test_unpack_undoes_pack() -> None:
    x, mask = torch.randn(3, 5, 4), torch.rand(3, 5) > 0.4
    mask[:, 2] = True
    packed = pack(Tokens(x, mask=mask))
    assert packed.x.shape == (1, int(mask.sum()), 4)
    assert packed.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert torch.equal(unpack(packed, mask).x, x * mask[..., None])


def test_what_cannot_be_packed() -> None:
    x = torch.randn(2, 4, 4)
    with pytest.raises(ValueError, match="grid"):
        pack(Tokens(x, grid=(2, 2)))
    with pytest.raises(ValueError, match="at least one real token"):
        pack(Tokens(x, mask=torch.tensor([[True] * 4, [False] * 4])))
    with pytest.raises(ValueError, match="cu_seqlens"):
        unpack(Tokens(x), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected 8 real tokens"):
        unpack(pack(Tokens(x)), torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("mixer", ["softmax", "delta_net"])
def test_an_encoder_on_real_tokens_alone_says_what_the_padded_one_says(mixer) -> None:
    torch.manual_seed(1)
    model = create_model(
        "encoder", num_classes=3, dim=16, depth=2, mixer=mixer, num_heads=2, vocab_size=11, max_length=9
    ).double()
    ids, mask = torch.randint(11, (4, 9)), torch.arange(9) < torch.tensor([[9], [4], [1], [6]])
    padded = model(ids, mask=mask)
    model.packing = True
    torch.testing.assert_close(model(ids, mask=mask), padded, rtol=1e-10, atol=1e-10)


def test_packing_is_refused_where_blocks_need_a_batch() -> None:
    with pytest.raises(UnsupportedError, match="packing"):
        create_model(
            "encoder",
            num_classes=3,
            dim=16,
            depth=1,
            mixer="softmax",
            vocab_size=5,
            max_length=4,
            norm="group_norm",
            packing=True,
        )


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_growing_is_concatenating(lengths: list[int]) -> None:
    pieces = [torch.randn(2, 3, n, 4) for n in lengths]
    state, other = State({"k": torch.zeros(2, 3, 0, 4)}), torch.zeros(2, dtype=torch.int64)
    seen = []
    for piece in pieces:
        state = state.grow(2, k=piece).replace(position=other)
        seen.append(state)
    for count, earlier in enumerate(seen, start=1):
        assert torch.equal(earlier["k"], torch.cat(pieces[:count], dim=2))


def test_a_state_that_grows_twice_stays_two_states() -> None:
    start = State({"k": torch.zeros(1, 0)}).grow(1, k=torch.ones(1, 3))
    left, right = start.grow(1, k=torch.full((1, 2), 2.0)), start.grow(1, k=torch.full((1, 4), 3.0))
    assert left["k"].tolist() == [[1, 1, 1, 2, 2]]
    assert right["k"].tolist() == [[1, 1, 1, 3, 3, 3, 3]]
    assert start["k"].tolist() == [[1, 1, 1]]


def test_a_state_grows_in_place_without_gradients_and_keeps_them_with() -> None:
    state = State({"k": torch.zeros(1, 0)}).grow(1, k=torch.ones(1, 3))
    after = state.grow(1, k=torch.ones(1, 1))
    assert after["k"].data_ptr() == state["k"].data_ptr()
    piece = torch.ones(1, 2, requires_grad=True)
    state.grow(1, k=piece)["k"].sum().backward()
    assert torch.equal(piece.grad, torch.ones(1, 2))


def test_decoding_from_one_state_twice() -> None:
    mixer = create_mixer("softmax", 8, 2, causal=True)
    x, left, right = torch.randn(1, 5, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    with torch.no_grad():
        _, state = mixer.extend(x, mixer.init_state(1))
        first, _ = mixer.extend(left, state)
        second, _ = mixer.extend(right, state)
        for token, y in ((left, first), (right, second)):
            torch.testing.assert_close(y, mixer(torch.cat((x, token), dim=1))[:, -1:])
