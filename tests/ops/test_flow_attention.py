"""Flow attention: chunks against the definition, sums handed on, masked tokens, precision, refusals."""

from __future__ import annotations

import pytest
import torch

from attnlab.core.errors import UnknownNameError
from attnlab.ops.flow_attention import FlowSums, eager, flow_attention
from ops.oracle import outputs_and_gradients, relative_error, values_and_gradients

SHAPES = [
    (1, 2, 1, 3, 4),
    (2, 3, 3, 5, 7),
    (1, 2, 63, 4, 4),
    (2, 2, 64, 3, 8),
    (2, 2, 65, 8, 3),
    (3, 9, 130, 4, 5),
]


def draw(b, h, n, d, e, *, dtype=torch.float64):
    """Features and values as projections give them, and sums of earlier tokens: views of (b, n, h, width)."""
    q, k = (torch.rand(b, n, h, d, dtype=dtype).transpose(1, 2) for _ in range(2))
    v = torch.randn(b, n, h, e, dtype=dtype).transpose(1, 2)
    sums = {name: 2 * torch.rand(x.shape, dtype=dtype) for name, x in FlowSums.zeros(q, v)._asdict().items() if name != "number"}
    return {"q": q, "k": k, "v": v, **sums}


def run(q, k, v, *, backend="auto", mask=None, number=3, **sums):
    """All results in a row, differentiable ones alone."""
    count = torch.full((q.shape[0],), number)
    initial = FlowSums(**sums, number=count) if sums else None
    o, flows, after = flow_attention(q, k, v, eps=0.05, mask=mask, initial=initial, backend=backend)
    return [o, *flows, *after[:-1]]


CASES = [(shape, first, masked) for shape in SHAPES for first in (False, True) for masked in (False, True)]


@pytest.mark.parametrize(("shape", "first", "masked"), [*CASES, ((1, 1, 4165, 3, 3), True, False)], ids=str)
def test_chunks_equal_the_definition_in_values_and_gradients(shape, first, masked):
    inputs = draw(*shape)
    if not first:
        inputs = {name: inputs[name] for name in "qkv"}
    mask = torch.rand(shape[0], shape[2]) < 0.6 if masked else None
    got = outputs_and_gradients(run, inputs, "eager", mask=mask)
    expected = outputs_and_gradients(run, inputs, "reference", mask=mask)
    count = len(got) - len(inputs)
    assert max(relative_error(x, y) for x, y in zip(got[:count], expected[:count], strict=True)) < 1e-9
    assert max(relative_error(x, y) for x, y in zip(got[count:], expected[count:], strict=True)) < 1e-8


def test_conserved_outflows_are_cut_and_pass_no_gradient_there():
    inputs = {name: x for name, x in draw(1, 1, 70, 3, 3).items() if name in "qkv"}
    inputs["k"] = inputs["k"] * torch.where(torch.arange(70) % 2 == 0, 1.0, 20.0)[:, None]
    q, k, v = inputs.values()
    number = torch.arange(1.0, 71, dtype=torch.float64).expand(1, -1)
    conserved = eager._forward(q, k, v, number, None, q.new_zeros(1, 1, 3, 7), q.new_zeros(1, 1), 0.05)[6]
    assert 10 < int((conserved > 1).sum()) < 60
    got, expected = (outputs_and_gradients(run, inputs, backend) for backend in ("eager", "reference"))
    assert max(relative_error(x, y) for x, y in zip(got, expected, strict=True)) < 1e-8


def test_two_tokens_by_hand():
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, 2, 1) for x in ([1.0, 2.0], [3.0, 5.0], [7.0, 11.0]))
    o, flows, after = flow_attention(q, k, v, eps=1e-12)
    inflow, outflow = torch.tensor([3.0, 8.0]), torch.tensor([3.0, 7.5])
    conserved_in = torch.tensor([3.0 * (1 / 3.0), 2.0 * (3.0 / 3.0 + 5.0 / 7.5) / 2])
    conserved_out = torch.tensor([3.0 / 3.0, 5.0 * (1 / 3.0 + 2.0 / 8.0) / 2]).clamp(-1.0, 1.0)
    competition = conserved_out.exp() / conserved_out.exp().cumsum(0) * torch.tensor([1.0, 2.0])
    terms = torch.tensor([3.0 * 7.0, 5.0 * 11.0]) * competition
    expected = conserved_in.sigmoid() * torch.tensor([1.0, 2.0]) * terms.cumsum(0) / (torch.tensor([1.0, 2.0]) * inflow)
    torch.testing.assert_close(flows.inflow.flatten().float(), inflow)
    torch.testing.assert_close(flows.competition.flatten().float(), competition)
    torch.testing.assert_close(o.flatten().float(), expected)
    torch.testing.assert_close(after.sources.flatten().float(), (torch.tensor([3.0, 5.0]) / outflow).sum()[None])
    assert after.number.tolist() == [2]


@pytest.mark.parametrize("splits", [[1, 1, 1, 137], [64, 76], [100, 1, 39]], ids=str)
def test_pieces_with_the_sums_handed_on_equal_one_pass(splits):
    inputs = {name: x for name, x in draw(2, 2, 140, 4, 5).items() if name in "qkv"}
    mask = torch.rand(2, 140) < 0.7

    def streamed(q, k, v):
        sums, pieces = None, []
        for *piece, real in zip(*(x.split(splits, 2) for x in (q, k, v)), mask.split(splits, 1), strict=True):
            o, _, sums = flow_attention(*piece, mask=real, initial=sums)
            pieces.append(o)
        return torch.cat(pieces, 2), *sums[:-1]

    def whole(q, k, v):
        o, _, sums = flow_attention(q, k, v, mask=mask)
        return o, *sums[:-1]

    got, expected = (values_and_gradients(function, *inputs.values()) for function in (streamed, whole))
    assert max(relative_error(x, y) for x, y in zip(got, expected, strict=True)) < 1e-9


def test_what_stands_at_masked_tokens_is_of_no_account():
    inputs = {name: x for name, x in draw(2, 2, 70, 4, 5).items() if name in "qkv"}
    mask = torch.rand(2, 70) < 0.7
    mask[0, :5] = False
    noise = {name: x.where(mask[:, None, :, None], 9.0) for name, x in inputs.items()}
    got, expected = (flow_attention(**x, mask=mask) for x in (noise, inputs))
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(x, y) for x, y in zip(got[2], expected[2], strict=True))
    assert torch.equal(got[0].abs().amax((1, 3)) > 0, mask)


def test_float32_error_is_that_of_the_formula():
    inputs = draw(1, 4, 700, 16, 16)
    exact = outputs_and_gradients(run, inputs, "reference")
    fast = outputs_and_gradients(run, inputs, "eager", torch.float32)
    plain = outputs_and_gradients(run, inputs, "reference", torch.float32)
    budgets = [4 * relative_error(x, y) + 4 * torch.finfo(torch.float32).eps for x, y in zip(plain, exact, strict=True)]
    errors = [relative_error(x, y) for x, y in zip(fast, exact, strict=True)]
    assert all(error <= budget for error, budget in zip(errors, budgets, strict=True)), (errors, budgets)


def test_half_precision_is_rounded_once():
    inputs = {name: x.bfloat16() for name, x in draw(1, 2, 100, 8, 8).items() if name in "qkv"}
    o, _, sums = flow_attention(**inputs)
    exact, _, last = flow_attention(**{name: x.float() for name, x in inputs.items()})
    assert o.dtype == torch.bfloat16 and sums.products.dtype == torch.float32
    assert torch.equal(o, exact.to(torch.bfloat16)) and torch.equal(sums.products, last.products)


def test_autocast_leaves_the_sums_in_float32():
    inputs = {name: x.float() for name, x in draw(1, 2, 70, 8, 8).items() if name in "qkv"}
    expected = flow_attention(**inputs)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flow_attention(**inputs)[0], expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(1, 2, 5, 7)}, ValueError, "q, k, v: expected"),
        ({"v": torch.zeros(1, 2, 6, 4)}, ValueError, "q, k, v: expected"),
        ({name: torch.zeros(1, 2, 0, 3) for name in "qkv"}, ValueError, "n >= 1"),
        ({"q": torch.zeros(1, 2, 5, 3, dtype=torch.long)}, TypeError, "q: expected a floating-point"),
        ({"eps": 0.0}, ValueError, "eps: expected a positive number"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "mask: expected shape"),
        ({"backend": "egaer"}, UnknownNameError, "eager"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {name: x.float() for name, x in draw(1, 2, 5, 3, 4).items() if name in "qkv"}
    with pytest.raises(error, match=message):
        flow_attention(**(good | change))


def test_sums_of_another_width_are_refused():
    good = {name: x for name, x in draw(1, 2, 5, 3, 4).items() if name in "qkv"}
    with pytest.raises(ValueError, match=r"initial\.products: expected shape \(1, 2, 3, 4\)"):
        flow_attention(**good, initial=FlowSums.zeros(torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 5, 3)))
