"""Means over adaptive segments against adaptive pooling of the real tokens alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnlab.mixers.parts.segments import segment_means


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_segments_are_those_of_the_real_tokens(count) -> None:
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    real = torch.ones(4, 7, dtype=torch.bool)
    real[1, 5:] = real[2, :3] = real[3, 1::2] = False
    pooled = segment_means(real, count, x.dtype) @ x
    for e in range(4):
        expected = F.adaptive_avg_pool1d(x[e, real[e]].T, count).T
        torch.testing.assert_close(pooled[e], expected, rtol=1e-12, atol=1e-12)


def test_without_a_real_token_there_is_nothing() -> None:
    assert (segment_means(torch.zeros(1, 4, dtype=torch.bool), 2, torch.float32) == 0).all()
