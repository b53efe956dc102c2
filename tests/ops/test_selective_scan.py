"""The selective scan: pieces and the log-step scan against the recurrence, states, precision, refusals."""

from __future__ import annotations

import functools

import pytest
import torch

from attnlab.core.errors import BackendUnavailableError
from attnlab.ops.selective_scan import eager, log_step, reference, selective_scan
from ops.oracle import assert_equal_in_float64, assert_within_budget, relative_error, values_and_gradients

SHAPES = [(1, 1, 1, 1), (2, 3, 6, 1), (1, 127, 6, 5), (2, 128, 6, 3), (3, 129, 12, 2), (2, 307, 6, 4)]
LAYOUTS = ["constant", "token", "grouped"]


def weights(layout, b, n, e, s):
    """B or C in one of the layouts, with three groups in the last."""
    return torch.randn({"constant": (e, s), "token": (b, n, s), "grouped": (b, n, 3, s)}[layout])


def core(b, n, e, s, layout="token"):
    """What the backends take: x, dt, A, B, C, the first state."""
    maps = [weights(layout, b, n, e, s) for _ in "BC"]
    maps = [w.unsqueeze(2) if w.ndim == 3 else w for w in maps]
    return torch.randn(b, n, e), torch.rand(b, n, e), -2 * torch.rand(e, s), *maps, torch.randn(b, e, s)


def draw(b, n, e, s, dtype=torch.float64):
    """Every tensor of the public function, by name."""
    shapes = {"u": (b, n, e), "delta": (b, n, e), "B": (b, n, s), "C": (b, n, s), "D": (e,), "z": (b, n, e), "delta_bias": (e,)}
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return tensors | {"A": -2 * torch.rand(e, s, dtype=dtype), "initial_state": torch.randn(b, e, s, dtype=dtype)}


def scan_of(names, backend):
    """`selective_scan` as a function of the tensors of these names."""
    return lambda *tensors: selective_scan(
        **dict(zip(names, tensors, strict=True)), delta_softplus="delta_bias" in names, backend=backend
    )


@pytest.mark.parametrize("form", [eager, log_step], ids=["eager", "log_step"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_forms_equal_the_recurrence(form, shape):
    assert_equal_in_float64(form.scan, reference.scan, *core(*shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_log_step_scan_in_every_layout(layout):
    assert_equal_in_float64(log_step.scan, reference.scan, *core(2, 37, 6, 3, layout))


@pytest.mark.parametrize("n", [1, 37])
@pytest.mark.parametrize("layout_c", LAYOUTS)
@pytest.mark.parametrize("layout_b", LAYOUTS)
def test_every_layout_of_b_and_c(layout_b, layout_c, n):
    tensors = draw(2, n, 6, 3) | {"B": weights(layout_b, 2, n, 6, 3), "C": weights(layout_c, 2, n, 6, 3)}
    assert_equal_in_float64(scan_of(tensors, "eager"), scan_of(tensors, "reference"), *tensors.values())


def test_groups_are_channels_in_a_row():
    tensors = draw(2, 5, 6, 3)
    B = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    whole, _ = selective_scan(**tensors | {"B": B})
    for group in range(3):
        part = slice(2 * group, 2 * group + 2)
        channels = {name: tensors[name][..., part] for name in ("u", "delta", "z", "D", "delta_bias")}
        states = {"A": tensors["A"][part], "initial_state": tensors["initial_state"][:, part]}
        y, _ = selective_scan(**tensors | channels | states | {"B": B[:, :, group]})
        torch.testing.assert_close(y, whole[..., part])


@pytest.mark.parametrize("room", [1, 600, 2000])
@pytest.mark.parametrize("layout", ["constant", "grouped"])
def test_pieces_and_blocks_of_any_size(monkeypatch, room, layout):
    monkeypatch.setattr(eager, "ROOM", room)
    assert_equal_in_float64(eager.scan, reference.scan, *core(5, 35, 6, 3, layout))


@pytest.mark.parametrize("left_out", [None, "D", "z", "delta_bias", "initial_state"])
def test_all_arguments_get_the_gradients_of_the_reference(left_out):
    tensors = {name: tensor for name, tensor in draw(2, 35, 6, 3).items() if name != left_out}
    assert_equal_in_float64(scan_of(tensors, "eager"), scan_of(tensors, "reference"), *tensors.values())


def test_the_equation_on_one_channel():
    y, last = selective_scan(
        torch.tensor([[[2.0], [3.0]]]),
        torch.tensor([[[0.5], [0.25]]]),
        torch.tensor([[-1.0]]),
        torch.tensor([[[1.0], [4.0]]]),
        torch.tensor([[[1.0], [2.0]]]),
        D=torch.tensor([10.0]),
        initial_state=torch.tensor([[[8.0]]]),
    )
    first = 8 * torch.exp(torch.tensor(-0.5)) + 0.5 * 2 * 1
    second = first * torch.exp(torch.tensor(-0.25)) + 0.25 * 3 * 4
    torch.testing.assert_close(y.flatten(), torch.stack([first + 20, 2 * second + 30]))
    torch.testing.assert_close(last.flatten(), second[None])


@pytest.mark.parametrize("n", [1, 35])
def test_complex_rates(n):
    names = ("u", "delta", "A", "B", "C", "initial_state")
    real = draw(2, n, 4, 3)

    def scan(backend, *parts):
        complex_ones = dict(
            zip(names[2:], (torch.complex(*pair) for pair in zip(parts[2::2], parts[3::2], strict=True)), strict=True)
        )
        y, last = selective_scan(parts[0], parts[1], **complex_ones, backend=backend)
        return y, last.real, last.imag

    parts = [real["u"], real["delta"].abs()]
    for name in names[2:]:
        parts += [real[name], torch.randn_like(real[name])]
    assert_equal_in_float64(functools.partial(scan, "eager"), functools.partial(scan, "reference"), *parts)


def test_a_conjugate_pair_of_states_is_one_complex_state():
    u, delta = torch.randn(1, 9, 1, dtype=torch.float64), torch.rand(1, 9, 1, dtype=torch.float64)
    rate = torch.tensor([[-0.3 + 2j]], dtype=torch.complex128)
    maps = torch.randn(2, 1, 1, dtype=torch.complex128)
    y, _ = selective_scan(u, delta, rate, maps[0], maps[1])
    both = [torch.cat([w, w.conj()], 1) for w in (rate, maps[0], maps[1])]
    pair, _ = reference.scan((u * delta).to(rate.dtype), delta.to(rate.dtype), *both, torch.zeros(1, 1, 2, dtype=rate.dtype))
    torch.testing.assert_close(y, pair.real)
    assert pair.imag.abs().max() < 1e-14


@pytest.mark.parametrize("pieces", [(1, 1, 1, 208), (129, 82), (210, 1), (128, 83)])
def test_streaming_by_pieces_equals_one_pass(pieces):
    tensors = draw(2, 211, 6, 3)
    per_token = {name: tensors.pop(name) for name in ("u", "delta", "B", "C", "z")}
    whole, last = selective_scan(**per_token, **tensors, delta_softplus=True)
    state, outputs = tensors.pop("initial_state"), []
    for piece in zip(*(tensor.split(pieces, 1) for tensor in per_token.values()), strict=True):
        y, state = selective_scan(**dict(zip(per_token, piece, strict=True)), **tensors, delta_softplus=True, initial_state=state)
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), whole) < 1e-12
    assert relative_error(state, last) < 1e-12


def test_float32_is_as_precise_as_the_recurrence():
    assert_within_budget(eager.scan, reference.scan, torch.float32, *core(2, 400, 8, 4))


def test_strong_decay_underflows_to_zero():
    x, dt, A, B, C, state = (t.float() for t in core(1, 40, 2, 2))
    y, last, *gradients = values_and_gradients(eager.scan, x, dt, 1e4 * A, B, C, state)
    expected = values_and_gradients(reference.scan, x, dt, 1e4 * A, B, C, state)
    assert all(torch.isfinite(t).all() for t in (y, last, *gradients))
    assert relative_error(y, expected[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_in_float32(dtype):
    narrow = draw(2, 40, 6, 3, dtype=dtype)
    y, last = selective_scan(**narrow, delta_softplus=True)
    wide_y, wide_last = selective_scan(**{name: t.float() for name, t in narrow.items()}, delta_softplus=True)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    assert torch.equal(y, wide_y.to(dtype)) and torch.equal(last, wide_last)


@pytest.mark.parametrize("n", [1, 40])
def test_autocast_changes_nothing(n):
    tensors = {name: t.requires_grad_() for name, t in draw(2, n, 6, 3, dtype=torch.float32).items()}
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, last = selective_scan(**tensors, delta_softplus=True)
            found.append((y, last, *torch.autograd.grad(y.sum() + last.sum(), list(tensors.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_mixed_dtypes_meet_in_the_widest():
    tensors = draw(1, 5, 4, 2, dtype=torch.float32)
    tensors["u"], tensors["z"] = tensors["u"].bfloat16(), tensors["z"].bfloat16()
    y, last = selective_scan(**tensors)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    _, last = selective_scan(**tensors | {"A": tensors["A"].double()})
    assert last.dtype == torch.float64


def test_nothing_of_tokens_times_channels_times_states_is_saved():
    sizes = []
    tensors = {name: t.requires_grad_() for name, t in draw(1, 512, 16, 16, dtype=torch.float32).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        selective_scan(**tensors, delta_softplus=True)
    assert 0 < max(sizes) <= 512 * 16


def test_the_log_step_scan_leaves_its_inputs_alone():
    tensors = core(2, 13, 6, 3)
    before = [t.clone() for t in tensors]
    log_step.scan(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("u", torch.randn(2, 6), ValueError, "u: expected \\(b, n, e\\)"),
        ("u", torch.randn(2, 0, 6), ValueError, "n >= 1"),
        ("u", torch.ones(2, 5, 6, dtype=torch.int64), TypeError, "u: expected a floating dtype, got torch.int64"),
        ("delta", torch.randn(2, 5, 7), ValueError, "delta: expected shape \\(2, 5, 6\\)"),
        ("A", torch.randn(6), ValueError, "A: expected \\(e, s\\)"),
        ("A", torch.randn(5, 3), ValueError, "A: expected shape \\(6, 3\\)"),
        ("B", torch.randn(2, 5, 4, 3), ValueError, "B: expected .* with g dividing 6, got \\(2, 5, 4, 3\\)"),
        ("B", torch.randn(2, 4, 3), ValueError, "B: expected"),
        ("C", torch.randn(2, 5, 3, dtype=torch.complex64), TypeError, "C: is torch.complex64 and A is torch.float32"),
        ("D", torch.randn(5), ValueError, "D: expected shape \\(6,\\)"),
        ("z", torch.randn(2, 5, 6, dtype=torch.complex64), TypeError, "z: expected a floating dtype"),
        ("initial_state", torch.randn(2, 6, 4), ValueError, "initial_state: expected shape \\(2, 6, 3\\)"),
    ],
)
def test_bad_input_is_refused(name, value, error, message):
    tensors = draw(2, 5, 6, 3, dtype=torch.float32) | {name: value}
    with pytest.raises(error, match=message):
        selective_scan(**tensors)


def test_groups_must_agree():
    tensors = draw(2, 5, 6, 3) | {"B": torch.randn(2, 5, 2, 3), "C": torch.randn(2, 5, 3, 3)}
    with pytest.raises(ValueError, match="as many groups in both \\(or one\\), got 2 and 3"):
        selective_scan(**tensors)


def test_a_backend_that_cannot_run_here_is_refused():
    with pytest.raises(BackendUnavailableError, match="takes float32, got"):
        selective_scan(**draw(1, 2, 2, 1), backend="triton")
