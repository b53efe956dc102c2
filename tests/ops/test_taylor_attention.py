"""Second-order attention: pieces against pairs, states, precision, refusals."""

from __future__ import annotations

import pytest
import torch

from attnlab.core.errors import UnknownNameError
from attnlab.ops.taylor_attention import features, taylor_attention
from ops.oracle import outputs_and_gradients, relative_error, values_and_gradients

SHAPES = [(1, 2, 1, 3, 4), (2, 3, 5, 5, 7), (1, 2, 256, 4, 4), (2, 3, 600, 3, 4), (1, 2, 1500, 2, 3)]


def draw(b, h, n, d, e, *, m=None, state=True):
    """Inputs as projections give them: views of (b, n, h, width)."""
    q, k, v = (
        torch.randn(b, size, h, width, dtype=torch.float64).transpose(1, 2) for size, width in ((n, d), (m or n, d), (m or n, e))
    )
    first = torch.randn(b, h, features(q).shape[-1], e, dtype=torch.float64) if state else None
    return {"q": q, "k": k, "v": v, "initial_state": first}


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_equal_pairs_in_values_and_gradients(shape, state, causal):
    inputs = draw(*shape, m=None if causal else shape[2] + 3, state=state)
    got = outputs_and_gradients(taylor_attention, inputs, "eager", causal=causal)
    expected = outputs_and_gradients(taylor_attention, inputs, "reference", causal=causal)
    assert max(relative_error(x, y) for x, y in zip(got[:2], expected[:2], strict=True)) < 1e-9
    assert max(relative_error(x, y) for x, y in zip(got[2:], expected[2:], strict=True)) < 1e-8


def test_products_of_features_are_the_weights():
    q, k = (torch.randn(1, 1, 6, 5, dtype=torch.float64) for _ in range(2))
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / 5**0.5
    torch.testing.assert_close(features(q) @ features(k).mT, 1 + scores + scores**2 / 2)


@pytest.mark.parametrize("splits", [[1, 1, 1, 597], [256, 344], [100, 1, 499]], ids=str)
def test_pieces_with_the_state_handed_on_equal_one_pass(splits):
    inputs = draw(1, 2, 600, 3, 4)

    def streamed(q, k, v, state):
        outputs = []
        for piece in zip(*(x.split(splits, 2) for x in (q, k, v)), strict=True):
            o, state = taylor_attention(*piece, initial_state=state)
            outputs.append(o)
        return torch.cat(outputs, 2), state

    def whole(q, k, v, state):
        return taylor_attention(q, k, v, initial_state=state)

    got, expected = (values_and_gradients(function, *inputs.values()) for function in (streamed, whole))
    assert max(relative_error(x, y) for x, y in zip(got, expected, strict=True)) < 1e-10


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_float32_error_is_that_of_the_formula(causal):
    inputs = draw(1, 4, 700, 8, 8)
    exact = outputs_and_gradients(taylor_attention, inputs, "reference", causal=causal)
    fast = outputs_and_gradients(taylor_attention, inputs, "eager", torch.float32, causal=causal)
    plain = outputs_and_gradients(taylor_attention, inputs, "reference", torch.float32, causal=causal)
    budgets = [4 * relative_error(x, y) + 4 * torch.finfo(torch.float32).eps for x, y in zip(plain, exact, strict=True)]
    errors = [relative_error(x, y) for x, y in zip(fast, exact, strict=True)]
    assert all(error <= budget for error, budget in zip(errors, budgets, strict=True)), (errors, budgets)


def test_half_precision_is_rounded_once():
    inputs = {name: x.bfloat16() for name, x in draw(1, 2, 100, 8, 8, state=False).items() if x is not None}
    o, state = taylor_attention(**inputs)
    exact, last = taylor_attention(**{name: x.float() for name, x in inputs.items()})
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(o, exact.to(torch.bfloat16)) and torch.equal(state, last)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(1, 2, 5, 7)}, ValueError, "q, k, v: expected"),
        ({"v": torch.zeros(1, 2, 6, 4)}, ValueError, "q, k, v: expected"),
        ({"k": torch.zeros(1, 2, 6, 3), "v": torch.zeros(1, 2, 6, 4)}, ValueError, "causal=True"),
        ({name: torch.zeros(1, 2, 0, 3) for name in "qkv"}, ValueError, "n, m >= 1"),
        ({"q": torch.zeros(1, 2, 5, 3, dtype=torch.long)}, TypeError, "q: expected a floating-point"),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, ValueError, "initial_state: expected shape"),
        ({"backend": "egaer"}, UnknownNameError, "eager"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {name: x.float() for name, x in draw(1, 2, 5, 3, 4).items()}
    with pytest.raises(error, match=message):
        taylor_attention(**(good | change))
