"""Linear attention: the chunked form against the recurrence, states, precision, refusals."""

from __future__ import annotations

import pytest
import torch

from attnlab.core.errors import BackendUnavailableError, UnknownNameError
from attnlab.ops.linear_attention import linear_attention
from ops.oracle import outputs_and_gradients, relative_error

SHAPES = [
    (1, 2, 1, 3, 4),
    (2, 3, 3, 5, 7),
    (1, 2, 63, 4, 4),
    (2, 2, 64, 3, 8),
    (2, 2, 65, 8, 3),
    (3, 9, 130, 4, 5),
    (1, 1, 2119, 4, 4),
]


def draw(b, h, n, d, e, *, decay=True, state=True, dtype=torch.float64):
    """Inputs as projections give them: views of (b, n, h, width)."""
    q, k, v = (torch.randn(b, n, h, width, dtype=dtype).transpose(1, 2) for width in (d, d, e))
    log_decay = -torch.logspace(0, -3, h, dtype=dtype) if decay else None
    return {
        "q": q,
        "k": k,
        "v": v,
        "log_decay": log_decay,
        "initial_state": torch.randn(b, h, d, e, dtype=dtype) if state else None,
    }


@pytest.mark.parametrize("decay", [True, False], ids=["decay", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_equal_recurrence_in_values_and_gradients(shape, decay):
    inputs = draw(*shape, decay=decay, state=shape[2] != 65)
    got = outputs_and_gradients(linear_attention, inputs, "eager", scale=0.7)
    expected = outputs_and_gradients(linear_attention, inputs, "reference", scale=0.7)
    assert [relative_error(x, y) < 1e-9 for x, y in zip(got[:2], expected[:2], strict=True)] == [True] * 2
    assert max(relative_error(x, y) for x, y in zip(got[2:], expected[2:], strict=True)) < 1e-8


def test_not_causal_equals_sum_over_all_keys():
    inputs = draw(2, 3, 17, 4, 5, decay=False)
    inputs["k"], inputs["v"] = (torch.randn(2, 3, 29, width, dtype=torch.float64) for width in (4, 5))
    got = outputs_and_gradients(linear_attention, inputs, "eager", causal=False, scale=0.3)
    expected = outputs_and_gradients(linear_attention, inputs, "reference", causal=False, scale=0.3)
    assert max(relative_error(x, y) for x, y in zip(got, expected, strict=True)) < 1e-9


def test_closed_form_of_two_tokens():
    q, k, v = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]), torch.tensor([7.0, 11.0])
    o, state = linear_attention(*(x.view(1, 1, 2, 1) for x in (q, k, v)), log_decay=torch.tensor([0.5]).log())
    assert torch.allclose(o.flatten(), torch.tensor([21.0, 2 * (0.5 * 21 + 55)]))
    assert state.item() == pytest.approx(0.5 * 21 + 55)


@pytest.mark.parametrize("splits", [[1, 1, 1, 137], [64, 76], [100, 1, 39]], ids=str)
def test_pieces_with_the_state_handed_on_equal_one_pass(splits):
    inputs = draw(2, 2, 140, 4, 5)
    whole, last = linear_attention(**inputs)
    state, pieces = inputs["initial_state"], []
    for q, k, v in zip(*(inputs[name].split(splits, 2) for name in "qkv"), strict=True):
        piece, state = linear_attention(q, k, v, log_decay=inputs["log_decay"], initial_state=state)
        pieces.append(piece)
    assert relative_error(torch.cat(pieces, 2), whole) < 1e-12
    assert relative_error(state, last) < 1e-12


@pytest.mark.parametrize("decay", [True, False], ids=["decay", "plain"])
def test_float32_error_is_that_of_the_formula(decay):
    inputs = draw(1, 4, 700, 16, 16, decay=decay)
    exact = outputs_and_gradients(linear_attention, inputs, "reference")
    fast = outputs_and_gradients(linear_attention, inputs, "eager", torch.float32)
    plain = outputs_and_gradients(linear_attention, inputs, "reference", torch.float32)
    budgets = [4 * relative_error(x, y) + 4 * torch.finfo(torch.float32).eps for x, y in zip(plain, exact, strict=True)]
    errors = [relative_error(x, y) for x, y in zip(fast, exact, strict=True)]
    assert all(error <= budget for error, budget in zip(errors, budgets, strict=True)), (errors, budgets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    inputs = {name: x.to(dtype) if name in "qkv" else x.float() for name, x in draw(1, 2, 100, 8, 8).items()}
    o, state = linear_attention(**inputs)
    exact, last = linear_attention(**{name: x.float() for name, x in inputs.items()})
    assert o.dtype == dtype and state.dtype == torch.float32
    assert torch.equal(o, exact.to(dtype)) and torch.equal(state, last)


def test_autocast_leaves_the_sums_in_float32():
    inputs = {name: x.float() for name, x in draw(1, 2, 70, 8, 8).items()}
    expected = linear_attention(**inputs)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(**inputs)[0], expected)
        mixed = linear_attention(**(inputs | {"q": inputs["q"].bfloat16()}))[0]
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, linear_attention(**(inputs | {"q": inputs["q"].bfloat16().float()}))[0])


def test_output_depends_on_no_later_token():
    inputs = draw(1, 1, 70, 3, 3)
    leaf = inputs["v"].detach().requires_grad_()
    grad = torch.autograd.grad(linear_attention(**(inputs | {"v": leaf}))[0][:, :, 40].sum(), leaf)[0]
    assert torch.equal(grad[:, :, 41:], torch.zeros_like(grad[:, :, 41:]))
    assert grad[:, :, :41].abs().amin() > 0


def test_a_decay_of_minus_infinity_forgets_all_but_the_token():
    inputs = draw(1, 2, 70, 3, 3) | {"log_decay": torch.full((2,), -torch.inf, dtype=torch.float64)}
    alone = (inputs["q"] * inputs["k"]).sum(-1, keepdim=True) * inputs["v"]
    assert relative_error(linear_attention(**inputs)[0], alone) < 1e-12


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ValueError, "4 dimensions"),
        ({"k": torch.zeros(1, 2, 5, 7)}, ValueError, "k, v: expected"),
        ({"v": torch.zeros(1, 2, 6, 4)}, ValueError, "k, v: expected"),
        ({"k": torch.zeros(1, 2, 6, 3), "v": torch.zeros(1, 2, 6, 4)}, ValueError, "causal=False"),
        ({"q": torch.zeros(1, 2, 5, 3, dtype=torch.long)}, TypeError, "q: expected a floating-point"),
        ({"log_decay": torch.zeros(3)}, ValueError, "log_decay: expected shape"),
        ({"causal": False}, ValueError, "log_decay: expected None"),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, ValueError, "initial_state: expected shape"),
        ({"backend": "egaer"}, UnknownNameError, "eager"),
        ({"backend": "triton"}, BackendUnavailableError, "Triton needs a GPU"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {name: x.float() for name, x in draw(1, 2, 5, 3, 4).items()}
    with pytest.raises(error, match=message):
        linear_attention(**(good | change))


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        linear_attention(*(torch.zeros(1, 2, 0, 3) for _ in range(3)))
