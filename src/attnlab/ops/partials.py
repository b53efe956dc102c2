"""Attention over a part of the keys as a value, and the merge of two such parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some keys: ``output`` (b, h, n, e) and ``lse`` (b, h, n), in float32 or wider."""

    output: Float[Tensor, "b h n e"]
    lse: Float[Tensor, "b h n"]


def merge(first: Partial, second: Partial) -> Partial:
    """Attention over the keys of both parts; associative, with an empty part as the neutral element."""
    lse = torch.logaddexp(first.lse, second.lse)
    # Where both parts are empty any finite reference serves: exp(-inf - 0) is 0, while -inf - -inf would be NaN.
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    left, right = (part.output * (part.lse - shift).exp().unsqueeze(-1).to(part.output.dtype) for part in (first, second))
    return Partial(left + right, lse)
