"""Second-order attention under compilers: one opaque op each way, symbolic lengths (run without the import hook)."""

from __future__ import annotations

import pytest
import torch

from attnlab.ops.taylor_attention import eager, taylor_attention


class Module(torch.nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal

    def forward(self, q, k, v):
        return taylor_attention(q, k, v, causal=self.causal)


def draw(n):
    return tuple(torch.randn(2, n, 3, width).transpose(1, 2) for width in (4, 4, 5))


@pytest.mark.parametrize("causal", [False, True])
def test_exports_with_a_dynamic_length(causal):
    tokens = torch.export.Dim("tokens", min=2, max=100_000)
    program = torch.export.export(Module(causal), draw(70), dynamic_shapes=({2: tokens},) * 3).module()
    for n in (5, 300):
        inputs = draw(n)
        for got, expected in zip(program(*inputs), Module(causal)(*inputs), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
def test_custom_op_passes_the_library_checks(causal, state):
    first = torch.rand(2, 3, 15, 5).requires_grad_() if state else None
    leaves = [x.detach().requires_grad_() for x in draw(70)]
    checks = torch.library.opcheck(eager._forward, (*leaves, first, causal), raise_exception=False)
    assert set(checks.values()) == {"SUCCESS"}
