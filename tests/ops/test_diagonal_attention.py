"""Attention along diagonals against a loop over pairs, in both implementations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab.ops.backends import use_backend
from attnlab.ops.diagonal_attention import diagonal_attention, eager
from ops.oracle import assert_equal_in_float64, assert_within_budget


def by_pairs(q: Tensor, k: Tensor, v: Tensor, distances: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition; the log-sum-exp of a query without a key is 0 here."""
    group, out, lse = q.shape[1] // k.shape[1], [], []
    for i in range(len(q)):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                keys = [t - x for x in distances[i, h].tolist() if 0 <= t - x < k.shape[2]]
                keys = [j for j in keys if allowed is None or allowed[i, min(h, allowed.shape[1] - 1), j]]
                if not keys:
                    out.append(0 * v[i, h // group, 0])
                    lse.append(0 * q[i, h, t, 0])
                    continue
                logits = torch.stack([q[i, h, t] @ k[i, h // group, j] / math.sqrt(q.shape[-1]) for j in keys])
                out.append(sum(w * v[i, h // group, j] for w, j in zip(logits.softmax(0), keys, strict=True)))
                lse.append(logits.logsumexp(0))
    return torch.stack(out).view(*q.shape[:3], -1), torch.stack(lse).view(q.shape[:3])


def finite(found) -> tuple[Tensor, Tensor]:
    return found.output, found.lse.masked_fill(found.lse == float("-inf"), 0.0)


def tensors(n: int, m: int, h: int = 4, hk: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, h, n, 3), torch.randn(2, hk, m, 3), torch.randn(2, hk, m, 5)


@pytest.mark.parametrize("rows", [4, 4096])
@pytest.mark.parametrize("heads", [None, 1, 4])
def test_equals_the_definition(monkeypatch, rows, heads):
    monkeypatch.setattr(eager, "ROWS", rows)
    distances = torch.randint(-9, 12, (2, 4, 6))
    distances[0, 0] = 99
    allowed = None if heads is None else torch.rand(2, heads, 11) > 0.4
    for backend in ("eager", "reference"):
        with use_backend(backend):
            assert_equal_in_float64(
                lambda *x: finite(diagonal_attention(*x, distances, allowed=allowed)),
                lambda *x: by_pairs(*x, distances, allowed),
                *tensors(13, 11),
            )


@settings(max_examples=15)
@given(st.data())
def test_any_size(data):
    n, m, r = (data.draw(st.integers(1, 9)) for _ in range(3))
    distances = torch.randint(-m - 1, n + 2, (2, 2, r))
    assert_equal_in_float64(
        lambda *x: finite(diagonal_attention(*x, distances)),
        lambda *x: by_pairs(*x, distances, None),
        *tensors(n, m, 2, 1),
    )


def test_half_precision_is_summed_in_single():
    distances = torch.arange(-8, 20).repeat(2, 4, 1)

    def run(backend):
        return lambda *x: finite(diagonal_attention(*x, distances, backend=backend))

    assert_within_budget(run("eager"), run("reference"), torch.bfloat16, *tensors(40, 40))


def test_what_takes_no_part_has_no_influence():
    q, k, v = tensors(7, 7)
    allowed = torch.rand(2, 1, 7) > 0.5
    distances = torch.arange(-6, 7).repeat(2, 4, 1)
    expected = diagonal_attention(q, k, v, distances, allowed=allowed)
    k, v = (x.masked_fill(~allowed.unsqueeze(-1), float("nan")) for x in (k, v))
    for backend in ("eager", "reference"):
        found = diagonal_attention(q, k, v, distances, allowed=allowed, backend=backend)
        torch.testing.assert_close(found.output, expected.output)
        torch.testing.assert_close(found.lse, expected.lse)


def test_nothing_to_attend_to():
    q, k, v = tensors(3, 3)
    none = diagonal_attention(q, k, v, torch.empty(2, 4, 0, dtype=torch.int64))
    assert float(none.output.abs().max()) == 0.0
    assert bool((none.lse == float("-inf")).all())


def test_refusals():
    q, k, v = tensors(4, 4)
    distances = torch.zeros(2, 4, 1, dtype=torch.int64)
    with pytest.raises(TypeError, match="distances: expected int64"):
        diagonal_attention(q, k, v, distances.int())
    with pytest.raises(ValueError, match="distances: expected"):
        diagonal_attention(q, k, v, distances[:, :2])
    with pytest.raises(ValueError, match="v: expected batch"):
        diagonal_attention(q, k, v[:, :, :3], distances)
    with pytest.raises(TypeError, match="allowed: expected bool"):
        diagonal_attention(q, k, v, distances, allowed=torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="allowed: expected"):
        diagonal_attention(q, k, v, distances, allowed=torch.ones(2, 4, 3, dtype=torch.bool))
