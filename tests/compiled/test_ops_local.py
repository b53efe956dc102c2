"""The selective scan, the sliding window and the short convolution under compilers (run without the import hook)."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnlab.ops.selective_scan import selective_scan
from attnlab.ops.short_conv import short_conv
from attnlab.ops.sliding_window import sliding_window_attention


def scan(n, **options):
    """Groups, bias, gate and state; dims 0 and 1 of all but the parameters may vary."""

    def function(u, delta, B, C, state, A):
        return selective_scan(
            u, delta, -A.exp(), B, C, D=A[:, 0], z=u, delta_bias=A[:, 1], delta_softplus=True, initial_state=state
        )

    u, delta = torch.randn(2, 2, n, 6, **options)
    B, C = torch.randn(2, n, 2, 3, **options), torch.randn(2, n, 3, **options)
    return function, [u, delta, B, C, torch.randn(2, 6, 3, **options), torch.randn(6, 3, **options)], [1, 1, 1, 1, None, None]


def window(n, **options):
    """Grouped heads, a window on both sides, sinks."""

    def function(q, k, v):
        return (sliding_window_attention(q, k, v, left=9, right=2, num_sinks=3),)

    shapes = ((2, 4, n, 8), (2, 2, n, 8), (2, 2, n, 4))
    return function, [torch.randn(shape, **options) for shape in shapes], [2, 2, 2]


def masked_window(n, **options):
    """With a mask that is computed in the graph, and queries without keys."""
    _, tensors, dims = window(n, **options)

    def function(q, k, v):
        mask = torch.arange(k.shape[2], device=k.device).expand(len(k), -1) >= 3
        return (sliding_window_attention(q, k, v, left=9, num_sinks=4, key_mask=mask),)

    return function, tensors, dims


def conv(n, **options):
    """With bias and state."""

    def function(x, weight, bias, state):
        return short_conv(x, weight, bias, state=state)

    shapes = ((2, n, 6), (6, 4), (6,), (2, 3, 6))
    return function, [torch.randn(shape, **options) for shape in shapes], [1, None, None, None]


OPS = pytest.mark.parametrize("make", [scan, window, masked_window, conv], ids=["scan", "window", "masked_window", "conv"])


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def values_and_gradients(function, tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    return [*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@OPS
@pytest.mark.parametrize("n", [1, 70])
def test_compiles_to_one_graph_with_gradients(make, n):
    function, tensors, _ = make(n)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(values_and_gradients(compiled, tensors), values_and_gradients(function, tensors))


@OPS
@pytest.mark.parametrize("n", [1, 70])
def test_compiles_to_one_graph_under_autocast(make, n):
    function, tensors, _ = make(n)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(compiled(*tensors), function(*tensors))


@OPS
def test_compiles_once_for_all_lengths(make):
    function, tensors, _ = make(70)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    values_and_gradients(compiled, tensors)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (3, 32, 300):
            tensors = make(n)[1]
            assert_same(values_and_gradients(compiled, tensors), values_and_gradients(function, tensors))


@OPS
def test_exports_with_a_dynamic_length(make):
    function, tensors, dims = make(70)
    tokens = torch.export.Dim("tokens", min=2, max=100_000)
    shapes = tuple(None if dim is None else {dim: tokens} for dim in dims)
    program = torch.export.export(Module(function), tuple(tensors), dynamic_shapes=(shapes,))
    for n in (5, 129):
        tensors = make(n)[1]
        assert_same(program.module()(*tensors), function(*tensors))


@OPS
@pytest.mark.parametrize("n", [1, 100_000])
def test_shapes_on_the_meta_device(make, n):
    function, tensors, _ = make(n, device="meta")
    outputs, short = function(*tensors), function(*make(5)[1])
    for x, y in zip(outputs, short, strict=True):
        assert x.is_meta and x.dtype == y.dtype
        assert list(x.shape) == [n if size == 5 else size for size in y.shape]
    leaves = [x.requires_grad_() for x in tensors]
    gradients = torch.autograd.grad(sum(o.sum() for o in function(*leaves)), leaves)
    assert [x.shape for x in gradients] == [x.shape for x in tensors]


@OPS
def test_fake_tensors_have_the_shapes_strides_and_dtypes_of_real_ones(make):
    function, tensors, _ = make(70)
    real = values_and_gradients(function, tensors)
    with FakeTensorMode() as mode:
        fake = values_and_gradients(function, [mode.from_tensor(x) for x in tensors])
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in real]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_custom_ops_pass_the_library_checks(dtype):
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    rates = (-torch.rand(6, 3, dtype=dtype)).requires_grad_()
    tokens, maps = [leaf(3, 70, 6) for _ in range(2)], [leaf(3, 70, 2, 3), leaf(6, 3)]
    heads = leaf(2, 4, 70, 6), leaf(2, 2, 80, 6), leaf(2, 2, 80, 3)
    calls = {
        torch.ops.attnlab.selective_scan_forward.default: (*tokens, rates, *maps, leaf(3, 6, 3)),
        torch.ops.attnlab.sliding_window_forward.default: (*heads, torch.rand(2, 80) > 0.3, 4, 3, 2, 0.3),
        torch.ops.attnlab.short_conv_forward.default: (leaf(3, 70, 6), leaf(6, 4), None),
    }
    for op, arguments in calls.items():
        assert set(torch.library.opcheck(op, arguments, raise_exception=False).values()) == {"SUCCESS"}, op
