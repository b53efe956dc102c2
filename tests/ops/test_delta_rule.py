"""The delta rule: the chunked form against the recurrence, states, precision, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from attnlab.core.errors import BackendUnavailableError, UnknownNameError
from attnlab.ops.delta_rule import delta_rule
from ops.oracle import outputs_and_gradients, relative_error

SHAPES = [
    (1, 2, 1, 3, 4),
    (2, 3, 3, 5, 7),
    (1, 2, 31, 4, 4),
    (2, 2, 32, 3, 8),
    (2, 2, 33, 8, 3),
    (3, 9, 70, 4, 5),
    (1, 1, 585, 4, 4),
]


def draw(b, h, n, d, e, *, state=True, gate=False, dtype=torch.float64):
    """Inputs as projections give them: views of (b, n, h, width), keys of length 1, write strengths in (0, 1)."""
    q, k, v = (torch.randn(b, n, h, width, dtype=dtype).transpose(1, 2) for width in (d, d, e))
    beta = torch.rand(b, n, h, dtype=dtype).transpose(1, 2)
    initial_state = torch.randn(b, h, d, e, dtype=dtype) if state else None
    log_decay = torch.nn.functional.logsigmoid(2 * torch.randn(b, n, h, dtype=dtype)).transpose(1, 2) if gate else None
    inputs = {"q": q, "k": normalize(k, dim=-1), "v": v, "beta": beta, "initial_state": initial_state}
    return inputs | ({"log_decay": log_decay} if gate else {})


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_equal_recurrence_in_values_and_gradients(shape, gate):
    inputs = draw(*shape, state=shape[2] != 33, gate=gate)
    got = outputs_and_gradients(delta_rule, inputs, "eager", scale=0.7)
    expected = outputs_and_gradients(delta_rule, inputs, "reference", scale=0.7)
    assert [relative_error(x, y) < 1e-9 for x, y in zip(got[:2], expected[:2], strict=True)] == [True] * 2
    assert max(relative_error(x, y) for x, y in zip(got[2:], expected[2:], strict=True)) < 1e-8


def test_a_full_write_is_read_back():
    k = normalize(torch.randn(1, 1, 40, 6, dtype=torch.float64), dim=-1)
    v = torch.randn(1, 1, 40, 5, dtype=torch.float64)
    o, _ = delta_rule(k, k, v, torch.ones(1, 1, 40, dtype=torch.float64), scale=1.0)
    assert relative_error(o, v) < 1e-12


def test_scale_is_by_default_that_of_the_key_width():
    inputs = draw(1, 2, 10, 4, 4)
    assert torch.equal(delta_rule(**inputs)[0], delta_rule(**inputs, scale=0.5)[0])


def test_a_step_without_strength_leaves_the_state():
    inputs = draw(1, 2, 50, 4, 4)
    inputs["beta"] = inputs["beta"].clone()
    inputs["beta"][:, :, 20:] = 0
    head = {name: x[:, :, :20] if name != "initial_state" else x for name, x in inputs.items()}
    assert relative_error(delta_rule(**inputs)[1], delta_rule(**head)[1]) < 1e-12


def test_a_gate_of_minus_infinity_begins_a_new_sequence():
    inputs = draw(1, 2, 50, 4, 4, gate=True)
    inputs["log_decay"] = inputs["log_decay"].clone()
    inputs["log_decay"][:, :, 20] = -torch.inf
    tail = {name: x[:, :, 20:] for name, x in inputs.items() if name != "initial_state"}
    assert relative_error(delta_rule(**inputs)[1], delta_rule(**tail)[1]) < 1e-12


@pytest.mark.parametrize("splits", [[1, 1, 1, 137], [64, 76], [100, 1, 39]], ids=str)
def test_pieces_with_the_state_handed_on_equal_one_pass(splits):
    inputs = draw(2, 2, 140, 4, 5)
    whole, last = delta_rule(**inputs)
    state, pieces = inputs["initial_state"], []
    for q, k, v, beta in zip(*(inputs[name].split(splits, 2) for name in ("q", "k", "v", "beta")), strict=True):
        piece, state = delta_rule(q, k, v, beta, initial_state=state)
        pieces.append(piece)
    assert relative_error(torch.cat(pieces, 2), whole) < 1e-12
    assert relative_error(state, last) < 1e-12


@pytest.mark.parametrize("keys", ["random", "repeated", "gated"])
def test_float32_error_is_that_of_the_formula(keys):
    inputs = draw(1, 4, 700, 16, 16, gate=keys == "gated")
    if keys == "repeated":  # the worst triangular systems: the same key again and again, each time written in full
        inputs["k"] = inputs["k"][:, :, :1].expand_as(inputs["k"])
        inputs["beta"] = torch.ones_like(inputs["beta"])
    exact = outputs_and_gradients(delta_rule, inputs, "reference")
    fast = outputs_and_gradients(delta_rule, inputs, "eager", torch.float32)
    plain = outputs_and_gradients(delta_rule, inputs, "reference", torch.float32)
    budgets = [4 * relative_error(x, y) + 4 * torch.finfo(torch.float32).eps for x, y in zip(plain, exact, strict=True)]
    errors = [relative_error(x, y) for x, y in zip(fast, exact, strict=True)]
    assert all(error <= budget for error, budget in zip(errors, budgets, strict=True)), (errors, budgets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    inputs = {name: x.float() if name == "initial_state" else x.to(dtype) for name, x in draw(1, 2, 100, 8, 8).items()}
    o, state = delta_rule(**inputs)
    exact, last = delta_rule(**{name: x.float() for name, x in inputs.items()})
    assert o.dtype == dtype and state.dtype == torch.float32
    assert torch.equal(o, exact.to(dtype)) and torch.equal(state, last)


def test_autocast_leaves_the_sums_in_float32():
    inputs = {name: x.float() for name, x in draw(1, 2, 70, 8, 8).items()}
    expected = delta_rule(**inputs)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(delta_rule(**inputs)[0], expected)
        mixed = delta_rule(**(inputs | {"beta": inputs["beta"].bfloat16()}))[0]
    assert torch.equal(mixed, delta_rule(**(inputs | {"beta": inputs["beta"].bfloat16().float()}))[0])


def test_output_depends_on_no_later_token():
    inputs = draw(1, 1, 70, 3, 3)
    for name in ("k", "v", "beta"):
        leaf = inputs[name].detach().requires_grad_()
        grad = torch.autograd.grad(delta_rule(**(inputs | {name: leaf}))[0][:, :, 40].sum(), leaf)[0]
        assert torch.equal(grad[:, :, 41:], torch.zeros_like(grad[:, :, 41:]))
        assert grad[:, :, 40].abs().amin() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 3)}, ValueError, "q, k, v: expected"),
        ({"k": torch.zeros(1, 2, 5, 7)}, ValueError, "q, k, v: expected"),
        ({"v": torch.zeros(1, 2, 6, 4)}, ValueError, "q, k, v: expected"),
        ({"k": torch.zeros(1, 2, 5, 3, dtype=torch.long)}, TypeError, "k: expected a floating-point"),
        ({"beta": torch.zeros(1, 2, 5, 1)}, ValueError, "beta: expected shape"),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, ValueError, "initial_state: expected shape"),
        ({"backend": "egaer"}, UnknownNameError, "eager"),
        ({"backend": "triton"}, BackendUnavailableError, "no backend"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {name: x.float() for name, x in draw(1, 2, 5, 3, 4).items()}
    with pytest.raises(error, match=message):
        delta_rule(**(good | change))


def test_an_empty_sequence_is_refused():
    q, k, v = (torch.zeros(1, 2, 0, 3) for _ in range(3))
    with pytest.raises(ValueError, match="at least one token"):
        delta_rule(q, k, v, torch.zeros(1, 2, 0))
