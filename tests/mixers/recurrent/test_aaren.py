"""Aaren by its definition, as masked softmax attention with one query, and what it costs in parameters and state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.ops.attention import attention
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 8, 2


def _definition(mixer, x: Tensor) -> Tensor:
    """The recurrence of the paper: a running maximum, numerator and denominator."""
    d, out = DIM // HEADS, []
    query = mixer.q_proj(mixer.query).view(HEADS, d)
    for example in x:
        k, v = (layer(example).view(-1, HEADS, d) for layer in (mixer.k_proj, mixer.v_proj))
        m, c, a = (
            torch.full((HEADS,), -1e4, dtype=x.dtype),
            torch.zeros(HEADS, dtype=x.dtype),
            torch.zeros(HEADS, d, dtype=x.dtype),
        )
        rows = []
        for t in range(len(example)):
            s = (query * k[t]).sum(-1) / math.sqrt(d)
            higher = torch.maximum(m, s)
            c = c * torch.exp(m - higher) + torch.exp(s - higher)
            a = a * torch.exp(m - higher)[:, None] + v[t] * torch.exp(s - higher)[:, None]
            m = higher
            rows.append(mixer.out_proj((a / c[:, None]).flatten()))
        out.append(torch.stack(rows if mixer.causal else [rows[-1]] * len(rows)))
    return torch.stack(out)


@pytest.mark.tier("T2", "mixer:aaren")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_definition(causal, bias) -> None:
    mixer = build("aaren", DIM, HEADS, causal=causal, qkv_bias=bias)
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(40, DIM))


def test_softmax_attention_with_a_fixed_query_is_this_recurrence() -> None:
    mixer, x = build("aaren", DIM, HEADS, causal=True), tokens(50, DIM).detach()
    q, k, v = mixer.project(x)
    expected = mixer.join(attention(q, k, v, causal=True), x, None)
    torch.testing.assert_close(mixer(x), expected)
    state = mixer.init_state(2)
    for t in range(50):
        y, state = mixer.extend(x[:, t : t + 1], state)
        torch.testing.assert_close(y, expected[:, t : t + 1])


def test_a_layer_costs_one_vector_more_than_a_transformer_s() -> None:
    def count(name: str) -> int:
        return sum(p.numel() for p in create_mixer(name, 512, 8, causal=True, qkv_bias=True).parameters())

    transformer = 12 * 512**2 + 13 * 512  # with two norms and a feed-forward network of 4 dim, all with biases
    rest = 8 * 512**2 + 9 * 512
    assert (transformer, transformer + 512) == (3_152_384, 3_152_896)
    assert (count("softmax") + rest, count("aaren") + rest) == (3_152_384, 3_152_896)


def test_the_state_is_two_numbers_and_a_mean_a_head() -> None:
    mixer = create_mixer("aaren", 64, 8, causal=True)
    state = mixer.init_state(1)
    _, after = mixer.extend(torch.randn(1, 500, 64), state)
    assert after.nbytes == state.nbytes == 4 * (64 + 8)
