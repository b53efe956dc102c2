"""Flow attention under compilers: one opaque op each way, symbolic lengths (run without the import hook)."""

from __future__ import annotations

import pytest
import torch

from attnlab.ops.flow_attention import eager, flow_attention


class Module(torch.nn.Module):
    def forward(self, q, k, v, mask):
        o, _, sums = flow_attention(q, k, v, mask=mask)
        return o, sums.products


def draw(n):
    q, k = (torch.rand(2, n, 3, 8).transpose(1, 2) for _ in range(2))
    return q, k, torch.randn(2, n, 3, 5).transpose(1, 2), torch.rand(2, n) < 0.7


def test_exports_with_a_dynamic_length():
    tokens = torch.export.Dim("tokens", min=2, max=100_000)
    program = torch.export.export(Module(), draw(70), dynamic_shapes=({2: tokens},) * 3 + ({1: tokens},)).module()
    for n in (5, 129):
        inputs = draw(n)
        for got, expected in zip(program(*inputs), Module()(*inputs), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_custom_op_passes_the_library_checks(masked):
    q, k, v, mask = draw(70)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, torch.rand(2, 3, 8, 9), torch.rand(2, 3))]
    number = torch.arange(1.0, 71).expand(2, -1)
    arguments = (*leaves[:3], number, mask if masked else None, *leaves[3:], 0.05)
    checks = torch.library.opcheck(eager._forward, arguments, raise_exception=False)
    assert set(checks.values()) == {"SUCCESS"}
