"""Softmax over prefixes: the chunks against the recurrence and against masked softmax, extremes, states, refusals."""

from __future__ import annotations

import pytest
import torch

from attnlab.ops.attention import attention
from attnlab.ops.partial_attention import Partial, merge
from attnlab.ops.prefix_softmax import prefix_softmax
from ops.oracle import outputs_and_gradients, relative_error

SHAPES = [(1, 2, 1, 4), (2, 3, 3, 7), (1, 2, 31, 4), (2, 2, 32, 8), (2, 2, 33, 3), (3, 9, 70, 5), (1, 1, 585, 4)]


def draw(b, h, n, e, *, state=True, heat=1.0):
    inputs = {
        "scores": heat * torch.randn(b, n, h, dtype=torch.float64).transpose(1, 2),
        "v": torch.randn(b, n, h, e, dtype=torch.float64).transpose(1, 2),
    }
    before = {"mean": torch.randn(b, h, e, dtype=torch.float64), "lse": torch.randn(b, h, dtype=torch.float64)}
    return inputs | (before if state else {})


def draw_mask(b, n):
    mask = torch.rand(b, n) > 0.4
    mask[:, : n // 3] = False
    return mask


@pytest.mark.parametrize("heat", [1.0, 300.0])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_equal_recurrence_in_values_and_gradients(shape, masked, heat):
    inputs = draw(*shape, state=shape[2] != 33, heat=heat)
    options = {"mask": draw_mask(shape[0], shape[2])} if masked else {}

    def finite(*args, **kwargs):
        mean, lse = prefix_softmax(*args, **kwargs)
        return mean, lse.clamp_min(-1e4)

    got = outputs_and_gradients(finite, inputs, "eager", **options)
    expected = outputs_and_gradients(finite, inputs, "reference", **options)
    for ours, theirs in zip(got, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-9 * max(1.0, float(theirs.abs().max()))


def test_it_is_softmax_attention_with_one_query_for_all():
    inputs = draw(2, 3, 70, 5, state=False)
    q, k = torch.zeros(2, 3, 70, 1, dtype=torch.float64), torch.zeros(2, 3, 70, 1, dtype=torch.float64)
    expected = attention(q, k, inputs["v"], bias=inputs["scores"].unsqueeze(2), causal=True)
    assert relative_error(prefix_softmax(**inputs)[0], expected) < 1e-12


def test_ever_larger_scores_do_not_lose_what_came_before():
    scores = torch.arange(0.0, 4000.0, 10.0)[None, None]
    v = torch.randn(1, 1, 400, 3)
    exact, total = prefix_softmax(scores.double(), v.double())
    got, lse = prefix_softmax(scores, v)
    assert relative_error(got, exact) < 1e-5
    assert relative_error(lse, total) < 1e-6
    falling, _ = prefix_softmax(-scores, v)
    assert relative_error(falling, prefix_softmax(-scores.double(), v.double())[0]) < 1e-5


@pytest.mark.parametrize("splits", [[1, 1, 1, 137], [64, 76], [100, 1, 39]], ids=str)
def test_pieces_with_the_state_handed_on_equal_one_pass(splits):
    inputs = draw(2, 2, 140, 5)
    mask = draw_mask(2, 140)
    whole, totals = prefix_softmax(**inputs, mask=mask)
    mean, lse, pieces = inputs["mean"], inputs["lse"], []
    for scores, v, here in zip(
        inputs["scores"].split(splits, 2), inputs["v"].split(splits, 2), mask.split(splits, 1), strict=True
    ):
        means, lses = prefix_softmax(scores, v, mask=here, mean=mean, lse=lse)
        mean, lse = means[:, :, -1], lses[:, :, -1]
        pieces.append(means)
    assert relative_error(torch.cat(pieces, 2), whole) < 1e-12
    assert relative_error(lse, totals[:, :, -1]) < 1e-12


def test_pieces_merge_as_parts_of_attention_do():
    inputs = draw(2, 2, 50, 5, state=False)
    whole, totals = prefix_softmax(**inputs)
    parts = []
    for at in (slice(0, 17), slice(17, 50)):
        means, lses = prefix_softmax(inputs["scores"][:, :, at], inputs["v"][:, :, at])
        parts.append(Partial(means[:, :, -1:], lses[:, :, -1:]))
    merged = merge(*parts)
    assert relative_error(merged.output, whole[:, :, -1:]) < 1e-12
    assert relative_error(merged.lse, totals[:, :, -1:]) < 1e-12


def test_nothing_counted_yet_is_zero_without_nan():
    scores, v = torch.randn(1, 1, 40, requires_grad=True), torch.randn(1, 1, 40, 3, requires_grad=True)
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[0, 35:] = True
    means, lses = prefix_softmax(scores, v, mask=mask)
    assert torch.equal(means[:, :, :35], torch.zeros(1, 1, 35, 3))
    assert torch.equal(lses[:, :, :35], torch.full((1, 1, 35), -torch.inf))
    for grad in torch.autograd.grad(means.square().sum() + lses[:, :, 35:].sum(), (scores, v)):
        assert torch.isfinite(grad).all() and torch.equal(grad[:, :, :35], torch.zeros_like(grad[:, :, :35]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(1, 2, 3)}, "scores, v"),
        ({"mask": torch.ones(1, 5, dtype=torch.bool)}, "mask"),
        ({"mean": torch.zeros(1, 2, 3)}, "mean, lse"),
        ({"mean": torch.zeros(1, 2, 3), "lse": torch.zeros(1, 2)}, "mean"),
    ],
    ids=str,
)
def test_wrong_arguments(change, message):
    inputs = draw(1, 2, 4, 4, state=False) | change
    with pytest.raises(ValueError, match=message):
        prefix_softmax(**inputs)
