"""The linear-time recurrences under compilers: one opaque op each way, symbolic lengths (run without the import hook)."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.gated_linear_attention import gated_linear_attention
from attnlab.ops.linear_attention import linear_attention


def linear(n, **options):
    q, k, v = (torch.randn(2, n, 3, 8, **options).transpose(1, 2) for _ in range(3))
    state = torch.randn(2, 3, 8, 8, **options)
    return lambda q, k, v, g, s: linear_attention(q, k, v, log_decay=-g.exp(), initial_state=s), [
        q,
        k,
        v,
        torch.randn(3, **options),
        state,
    ]


def delta(n, **options):
    q, k, v = (torch.randn(2, n, 3, 8, **options).transpose(1, 2) for _ in range(3))
    beta, gate = (torch.rand(2, n, 3, **options).transpose(1, 2) for _ in range(2))
    state = torch.randn(2, 3, 8, 8, **options)
    return lambda q, k, v, beta, g, s: delta_rule(q, 0.2 * k, v, beta, log_decay=-g, initial_state=s), [
        q,
        k,
        v,
        beta,
        gate,
        state,
    ]


def gated(n, **options):
    q, k, v, gate = (torch.rand(2, n, 3, 8, **options).transpose(1, 2) for _ in range(4))
    state = torch.randn(2, 3, 8, 8, **options)
    return lambda q, k, v, g, s: gated_linear_attention(q, k, v, g, initial_state=s), [q, k, v, -gate, state]


MAKERS = {"linear_attention": linear, "delta_rule": delta, "gated_linear_attention": gated}
OPS = pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def values_and_gradients(function, tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    o, state = function(*leaves)
    return o, state, *torch.autograd.grad(o.square().sum() + state.sum(), leaves)


@OPS
@pytest.mark.parametrize("n", [1, 70])
def test_compiles_to_one_graph_with_gradients(make, n):
    function, tensors = make(n)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, expected in zip(values_and_gradients(compiled, tensors), values_and_gradients(function, tensors), strict=True):
        torch.testing.assert_close(got, expected)


@OPS
def test_compiles_once_for_all_lengths(make):
    function, _ = make(2)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.compiler.set_stance("default"):
        values_and_gradients(compiled, make(70)[1])
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (3, 32, 300):
            tensors = make(n)[1]
            for got, expected in zip(
                values_and_gradients(compiled, tensors), values_and_gradients(function, tensors), strict=True
            ):
                torch.testing.assert_close(got, expected)


@OPS
def test_exports_with_a_dynamic_length(make):
    function, tensors = make(70)
    tokens = {2: torch.export.Dim("tokens", min=2, max=100_000)}
    dims = [tokens if x.dim() > 2 and x.shape[2] == 70 else None for x in tensors]
    program = torch.export.export(Module(function), tuple(tensors), dynamic_shapes=(tuple(dims),))
    for n in (5, 129):
        tensors = make(n)[1]
        for got, expected in zip(program.module()(*tensors), function(*tensors), strict=True):
            torch.testing.assert_close(got, expected)


@OPS
@pytest.mark.parametrize("n", [1, 100_000])
def test_shapes_on_the_meta_device(make, n):
    function, tensors = make(n, device="meta")
    o, state, *grads = values_and_gradients(function, tensors)
    assert (o.shape, state.shape) == ((2, 3, n, 8), (2, 3, 8, 8))
    assert [x.shape for x in grads] == [x.shape for x in tensors]


@OPS
def test_fake_tensors_have_the_shapes_strides_and_dtypes_of_real_ones(make):
    function, tensors = make(70)
    real = values_and_gradients(function, tensors)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = values_and_gradients(function, [mode.from_tensor(x) for x in tensors])
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in real]


@pytest.mark.parametrize("name", list(MAKERS))
def test_custom_op_passes_the_library_checks(name):
    _, tensors = MAKERS[name](70)
    leaves = [x.detach().requires_grad_() for x in tensors]
    op = getattr(torch.ops.attnlab, f"{name}_forward").default
    checks = torch.library.opcheck(op, (*leaves, 1.0), raise_exception=False)
    assert set(checks.values()) == {"SUCCESS"}
