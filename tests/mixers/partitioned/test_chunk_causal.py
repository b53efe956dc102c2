"""Chunk-causal attention token by token, and its two limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens


def definition(mixer):
    def attend(x: Tensor) -> Tensor:
        q, k, v = (split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        heads = []
        for h in range(mixer.num_heads):
            rows = []
            for i in range(x.shape[1]):
                keys = [j for j in range(x.shape[1]) if j // mixer.chunk <= i // mixer.chunk]
                logits = torch.einsum("bd,bmd->bm", q[h][:, i], k[h][:, keys]) / math.sqrt(q[h].shape[-1])
                rows.append(torch.einsum("bm,bmd->bd", logits.softmax(-1), v[h][:, keys]))
            heads.append(torch.stack(rows, dim=1))
        return mixer.out_proj(torch.cat(heads, dim=-1))

    return attend


@pytest.mark.tier("T2", "mixer:chunk_causal")
@pytest.mark.parametrize(("chunk", "n"), [(1, 5), (3, 11), (4, 8), (5, 3)])
def test_equals_its_definition(chunk, n) -> None:
    mixer = build("chunk_causal", chunk=chunk)
    assert_defined_by(mixer, definition(mixer), tokens(n))


@pytest.mark.parametrize(("chunk", "causal"), [(1, True), (9, False)])
def test_the_limits_are_causal_and_dense_attention(chunk, causal) -> None:
    mixer, dense = build("chunk_causal", chunk=chunk), build("softmax", causal=causal)
    dense.load_state_dict(mixer.state_dict())
    x = tokens(9)
    torch.testing.assert_close(mixer(x), dense(x))


def test_chunks_begin_with_the_first_real_token() -> None:
    mixer, x = build("chunk_causal", chunk=3), tokens(9)
    mask = torch.arange(9)[None] >= torch.tensor([[0], [2]])
    y = mixer(x, mask=mask)
    torch.testing.assert_close(y[1, 2:], mixer(x[1:, 2:])[0])
    torch.testing.assert_close(y[0], mixer(x[:1])[0])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="chunk: expected at least 1"):
        create_mixer("chunk_causal", 8, 2, chunk=0)
