"""Linear attention with decays of the token: the chunked form against the recurrence, extremes, states, precision, refusals."""

from __future__ import annotations

import pytest
import torch

from attnlab.ops.gated_linear_attention import gated_linear_attention
from attnlab.ops.linear_attention import linear_attention
from ops.oracle import outputs_and_gradients, relative_error

SHAPES = [(1, 2, 1, 3, 4), (2, 3, 3, 5, 7), (1, 2, 63, 4, 4), (2, 2, 65, 8, 3), (3, 9, 130, 4, 5), (1, 1, 1063, 4, 4)]


def draw(b, h, n, d, e, *, per_channel=True, state=True, strength=1.0):
    """Float64 inputs as projections give them: views of (b, n, h, width)."""
    widths = {"q": d, "k": d, "v": e, "log_decay": d if per_channel else 1}
    inputs = {name: torch.randn(b, n, h, width, dtype=torch.float64).transpose(1, 2) for name, width in widths.items()}
    inputs["log_decay"] = strength * torch.nn.functional.logsigmoid(inputs["log_decay"])
    return inputs | {"initial_state": torch.randn(b, h, d, e, dtype=torch.float64) if state else None}


def assert_equal_to_recurrence(inputs, **options):
    """The gradient of a decay that leaves nothing is next to nothing: its error counts against the largest of all gradients."""
    got = outputs_and_gradients(gated_linear_attention, inputs, "eager", **options)
    expected = outputs_and_gradients(gated_linear_attention, inputs, "reference", **options)
    size = max(float(x.abs().max()) for x in expected[2:])
    assert max(float((x - y).abs().max()) for x, y in zip(got[2:], expected[2:], strict=True)) < 1e-12 * size
    if float(inputs["log_decay"].amin()) < -40.0:
        got, expected = got[:2], expected[:2]
    assert max(relative_error(x, y) for x, y in zip(got[:2], expected[:2], strict=True)) < 1e-9
    assert all(relative_error(x, y) < 1e-8 for x, y in zip(got[2:], expected[2:], strict=True))


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "head"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_equal_recurrence_in_values_and_gradients(shape, per_channel):
    assert_equal_to_recurrence(draw(*shape, per_channel=per_channel, state=shape[2] != 65), scale=0.7)


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "head"])
@pytest.mark.parametrize("strength", [0.0, 30.0, 400.0])
def test_no_decay_and_decays_too_strong_for_long_chunks(strength, per_channel):
    assert_equal_to_recurrence(draw(1, 2, 131, 3, 4, per_channel=per_channel, strength=strength))


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "head"])
def test_a_token_that_forgets_everything_begins_a_new_sequence(per_channel):
    inputs = draw(1, 2, 140, 4, 4, per_channel=per_channel)
    inputs["log_decay"][:, :, 100] = -torch.inf
    whole, last = gated_linear_attention(**inputs)
    later = {name: x if name == "initial_state" else x[:, :, 100:] for name, x in inputs.items()} | {"initial_state": None}
    alone, end = gated_linear_attention(**later)
    assert relative_error(whole[:, :, 100:], alone) < 1e-12
    assert relative_error(last, end) < 1e-12


def test_one_decay_for_all_tokens_is_linear_attention():
    inputs = draw(2, 3, 100, 4, 5)
    decay = -torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    inputs["log_decay"] = decay[:, None, None].expand(2, 3, 100, 1)
    got = gated_linear_attention(**inputs)
    expected = linear_attention(**(inputs | {"log_decay": decay}))
    assert max(relative_error(x, y) for x, y in zip(got, expected, strict=True)) < 1e-12


@pytest.mark.parametrize("splits", [[1, 1, 1, 137], [64, 76], [100, 1, 39]], ids=str)
def test_pieces_with_the_state_handed_on_equal_one_pass(splits):
    inputs = draw(2, 2, 140, 4, 5)
    whole, last = gated_linear_attention(**inputs)
    state, pieces = inputs.pop("initial_state"), []
    for part in zip(*(x.split(splits, 2) for x in inputs.values()), strict=True):
        piece, state = gated_linear_attention(*part, initial_state=state)
        pieces.append(piece)
    assert relative_error(torch.cat(pieces, 2), whole) < 1e-12
    assert relative_error(state, last) < 1e-12


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "head"])
@pytest.mark.parametrize("strength", [1 / 16, 4.0])
def test_float32_error_is_that_of_the_formula(strength, per_channel):
    inputs = draw(1, 4, 700, 16, 16, per_channel=per_channel, strength=strength)
    exact = outputs_and_gradients(gated_linear_attention, inputs, "reference")
    fast = outputs_and_gradients(gated_linear_attention, inputs, "eager", torch.float32)
    plain = outputs_and_gradients(gated_linear_attention, inputs, "reference", torch.float32)
    budgets = [4 * relative_error(x, y) + 4 * torch.finfo(torch.float32).eps for x, y in zip(plain, exact, strict=True)]
    errors = [relative_error(x, y) for x, y in zip(fast, exact, strict=True)]
    assert all(error <= budget for error, budget in zip(errors, budgets, strict=True)), (errors, budgets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    inputs = {name: x.float() if name == "initial_state" else x.to(dtype) for name, x in draw(1, 2, 100, 8, 8).items()}
    o, state = gated_linear_attention(**inputs)
    exact, last = gated_linear_attention(**{name: x.float() for name, x in inputs.items()})
    assert o.dtype == dtype and state.dtype == torch.float32
    assert torch.equal(o, exact.to(dtype)) and torch.equal(state, last)


def test_output_depends_on_no_later_token():
    inputs = draw(1, 1, 70, 3, 3)
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("k", "v", "log_decay")}
    grads = torch.autograd.grad(gated_linear_attention(**(inputs | leaves))[0][:, :, 40].sum(), list(leaves.values()))
    for grad in grads:
        assert torch.equal(grad[:, :, 41:], torch.zeros_like(grad[:, :, 41:]))
        assert grad[:, :, 30:41].abs().amin() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ValueError, "q, k, v"),
        ({"k": torch.zeros(1, 2, 5, 3)}, ValueError, "q, k, v"),
        ({"log_decay": torch.zeros(1, 2, 4, 2)}, ValueError, "log_decay"),
        ({"log_decay": torch.zeros(2)}, ValueError, "log_decay"),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, ValueError, "initial_state"),
        ({"v": torch.zeros(1, 2, 4, 4, dtype=torch.int64)}, TypeError, "v"),
    ],
    ids=str,
)
def test_wrong_arguments(change, error, message):
    inputs = draw(1, 2, 4, 3, 4) | change
    with pytest.raises(error, match=message):
        gated_linear_attention(**inputs)
