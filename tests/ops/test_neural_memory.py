"""The neural memory: chunks in closed form against the recurrence with automatic gradients, states, precision, refusals."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from attnlab.core.errors import BackendUnavailableError, UnknownNameError
from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.neural_memory import MemoryState, neural_memory, read_memory
from mixers.memory_definition import HeadMemory
from ops.oracle import assert_equal_in_float64, assert_within_budget, relative_error

SHAPES = [(1, 2, 1, 3, 4), (2, 3, 7, 5, 4), (2, 2, 33, 4, 4)]
GATES = (0.2, 0.7, 0.05)  # bounds of alpha, eta, theta


def draw(b, h, n, d, e, *, depth=2, hidden=5, dtype=torch.float64) -> list[Tensor]:
    """q, k, v, alpha, eta, theta, and the weights of memory, momentum and anchor."""
    q, k = (normalize(torch.randn(b, h, n, d, dtype=dtype), dim=-1) for _ in "qk")
    gates = [bound * torch.rand(b, h, n, dtype=dtype) for bound in GATES]
    widths = [d, *[hidden] * (depth - 1), e]
    pairs = list(pairwise(widths))
    weights = [s * torch.randn(b, h, i, o, dtype=dtype) * i**-0.5 for s in (1.0, 0.1, 1.0) for i, o in pairs]
    return [q, k, torch.randn(b, h, n, e, dtype=dtype), *gates, *weights]


def run(backend, *inputs, place=0, mask=None, **options):
    """Output and the weights after, from the list that `draw` gives; the anchor counts only inside a chunk."""
    weights, depth = inputs[6:], len(inputs[6:]) // 3
    groups = [tuple(weights[i * depth : (i + 1) * depth]) for i in range(3)]
    y, state = neural_memory(*inputs[:6], MemoryState(*groups, place), mask=mask, backend=backend, **options)
    y = y if mask is None else y.masked_fill(~mask[:, None, :, None], 0.0)
    inside = torch.as_tensor(state.place).expand(len(y)).view(-1, 1, 1, 1) > 0
    return [y, *state.memory, *state.momentum, *(w * inside for w in state.anchor)]


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_equals_the_loop_over_tokens(depth, chunk, backend):
    inputs = draw(2, 2, 9, 3, 4, depth=depth)[: 6 + depth]

    def loop(q, k, v, alpha, eta, theta, *weights):
        rows = []
        for b in range(2):
            for h in range(2):
                head, out = HeadMemory([w[b, h] for w in weights], chunk, "silu"), []
                for t in range(9):
                    head.write(k[b, h, t], v[b, h, t], alpha[b, h, t], eta[b, h, t], theta[b, h, t])
                    out.append(head.read(q[b, h, t]))
                rows.append(torch.stack(out))
        return torch.stack(rows).unflatten(0, (2, 2))

    def ours(*inputs):
        return neural_memory(*inputs[:6], MemoryState.fresh(tuple(inputs[6:])), chunk=chunk, backend=backend)[0]

    assert_equal_in_float64(ours, loop, *inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@pytest.mark.parametrize("activation", ["silu", "gelu", "tanh"])
def test_chunks_equal_the_reference_from_any_state(shape, chunk, activation):
    inputs, options = draw(*shape), {"chunk": chunk, "activation": activation, "place": min(2, chunk - 1)}
    assert_equal_in_float64(lambda *x: run("eager", *x, **options), lambda *x: run("reference", *x, **options), *inputs)


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("depth", [1, 3])
def test_every_example_has_a_place_and_padding_of_its_own(chunk, depth):
    inputs, place = draw(3, 2, 13, 4, 4, depth=depth), torch.tensor([0, 1, 2]) % chunk
    mask = torch.rand(3, 13, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0] = False
    for given in (mask, None, mask[:, :1]):
        cut = [x[:, :, :1] if i < 6 and given is not None and given.shape[1] == 1 else x for i, x in enumerate(inputs)]
        options = {"chunk": chunk, "place": place, "mask": given}
        assert_equal_in_float64(
            lambda *x, o=options: run("eager", *x, **o), lambda *x, o=options: run("reference", *x, **o), *cut
        )


def test_gates_at_their_limits_have_finite_gradients():
    inputs = draw(1, 2, 10, 4, 4)
    for i, value in ((3, 1.0), (4, 0.0), (5, 0.0)):
        inputs[i] = inputs[i].clone()
        inputs[i][:, :, 3:6] = value
    assert_equal_in_float64(lambda *x: run("eager", *x, chunk=4), lambda *x: run("reference", *x, chunk=4), *inputs)


def test_a_matrix_without_momentum_is_the_delta_rule():
    q, k, v, _, _, theta, weight = draw(2, 2, 20, 4, 5, depth=1)[:7]
    none = torch.zeros_like(theta)
    y, state = neural_memory(q, k, v, none, none, theta, MemoryState.fresh((weight,)))
    expected, last = delta_rule(q, k, v, 2.0 * theta, scale=1.0, initial_state=weight)
    assert relative_error(y, expected) < 1e-12 and relative_error(state.memory[0], last) < 1e-12


def test_what_is_written_again_and_again_is_read():
    key, value = normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    k, v = key.expand(-1, -1, 400, -1), value.expand(-1, -1, 400, -1)
    none, step = torch.zeros(1, 1, 400, dtype=torch.float64), torch.full((1, 1, 400), 0.2, dtype=torch.float64)
    memory = tuple(torch.randn(1, 1, 8, 8, dtype=torch.float64) * 8**-0.5 for _ in range(2))
    _, state = neural_memory(k, k, v, none, none, step, MemoryState.fresh(memory), chunk=4)
    assert relative_error(read_memory(key, state.memory), value) < 1e-3
    assert relative_error(read_memory(key, memory), value) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_the_formula(dtype):
    q, k, v, *gates = draw(1, 2, 300, 8, 8, hidden=16)[:6]
    memory = draw(1, 2, 1, 8, 8, hidden=16)[6:8]

    def op(backend):
        return lambda *x: neural_memory(*x[:6], MemoryState.fresh(tuple(x[6:])), chunk=16, backend=backend)[0]

    assert_within_budget(op("eager"), op("reference"), dtype, q, k, v, *gates, *memory)


def test_output_depends_on_no_later_token():
    inputs = draw(1, 1, 20, 3, 3)
    for i in range(1, 6):
        leaf = inputs[i].detach().requires_grad_()
        y = run("eager", *inputs[:i], leaf, *inputs[i + 1 :], chunk=8)[0]
        gradient = torch.autograd.grad(y[:, :, 11].sum(), leaf)[0]
        assert torch.equal(gradient[:, :, 12:], torch.zeros_like(gradient[:, :, 12:]))
        assert gradient[:, :, 11].abs().amax() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 3)}, ValueError, "q, k, v: expected"),
        ({"v": torch.zeros(1, 2, 6, 4)}, ValueError, "q, k, v: expected"),
        ({"k": torch.zeros(1, 2, 5, 3, dtype=torch.long)}, TypeError, "k: expected a floating-point"),
        ({"eta": torch.zeros(1, 2, 5, 1)}, ValueError, "eta: expected shape"),
        ({"chunk": 0}, ValueError, "chunk: expected at least 1"),
        ({"activation": "sliu"}, UnknownNameError, "silu"),
        ({"state": MemoryState.fresh((torch.zeros(1, 2, 3, 5),))}, ValueError, "state: expected weights"),
        ({"backend": "triton"}, BackendUnavailableError, "no backend"),
    ],
)
def test_bad_input_is_named(change, error, message):
    names = ("q", "k", "v", "alpha", "eta", "theta")
    inputs = draw(1, 2, 5, 3, 4, dtype=torch.float32)
    good = {**dict(zip(names, inputs[:6], strict=True)), "state": MemoryState.fresh(tuple(inputs[6:8]))}
    with pytest.raises(error, match=message):
        neural_memory(**(good | change))


def test_an_empty_sequence_is_refused():
    q, gate = torch.zeros(1, 2, 0, 3), torch.zeros(1, 2, 0)
    with pytest.raises(ValueError, match="at least one token"):
        neural_memory(q, q, q, gate, gate, gate, MemoryState.fresh((torch.zeros(1, 2, 3, 3),)))
