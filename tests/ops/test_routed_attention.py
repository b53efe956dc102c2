"""Attention to blocks that each query chooses, against the mask that the choice amounts to."""

from __future__ import annotations

import pytest
import torch

from attnlab.core.tilings import segments_of
from attnlab.ops.backends import use_backend
from attnlab.ops.partial_attention.reference import partial_attention
from attnlab.ops.tile_attention import routed_kernels
from attnlab.ops.tile_attention.routed import routed_attention
from ops.oracle import assert_equal_in_float64


def dense(q, k, v, chosen, blocks, causal, key_mask):
    """All pairs, those of a chosen block allowed."""
    m = k.shape[2]
    member = torch.zeros(len(blocks), m + 1).scatter(1, blocks.masked_fill(blocks < 0, m), 1.0)[:, :m]
    allowed = (chosen.float() @ member) > 0
    if causal:
        allowed = allowed & torch.ones(q.shape[2], m, dtype=torch.bool).tril()
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return partial_attention(q, k, v, scale=q.shape[-1] ** -0.5, bias=None, allowed=allowed)


@pytest.mark.parametrize("size", [2, 64])
@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_equals_the_mask(monkeypatch, size, causal, masked):
    monkeypatch.setattr(routed_kernels, "QUERIES", size)
    chosen = torch.rand(2, 4, 21, 6) < 0.4
    chosen[..., 0] &= ~chosen[..., 1:].all(-1)
    chosen[0, 0, 3] = False
    chosen[1, 2] = False
    blocks = segments_of(21, 4)
    mask = torch.rand(2, 21) > 0.3 if masked else None
    inputs = (torch.randn(2, 4, 21, 3), torch.randn(2, 2, 21, 3), torch.randn(2, 2, 21, 5))
    for output in range(2):

        def ours(*x, output=output):
            found = routed_attention(*x, chosen, blocks, causal=causal, key_mask=mask)[output]
            return found.masked_fill(found == float("-inf"), 0.0)

        def theirs(*x, output=output):
            found = dense(*x, chosen, blocks, causal, mask)[output]
            return found.masked_fill(found == float("-inf"), 0.0)

        assert_equal_in_float64(ours, theirs, *inputs)
        with use_backend("reference"):
            assert_equal_in_float64(ours, theirs, *inputs)


def test_a_wrong_choice_is_refused():
    q = torch.randn(1, 2, 4, 3)
    with pytest.raises(ValueError, match="chosen: expected"):
        routed_attention(q, q, q, torch.ones(1, 2, 4, 3, dtype=torch.bool), segments_of(4, 2))
