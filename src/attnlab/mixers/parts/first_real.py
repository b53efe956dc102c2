"""Attention whose blocks are counted from a sequence's beginning, on a batch that is padded on the left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values (b, h, n, d) and their mask (b, n), to outputs (b, h, n, e)."""


def from_first_real(
    attend: Attend,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    mask: Bool[Tensor, "b n"],
) -> Float[Tensor, "b h n e"]:
    """``attend`` with the first real token of each example in the first place: masked tokens before it are put behind all."""
    place = torch.arange(q.shape[2], device=q.device)
    first = mask.long().argmax(1, keepdim=True)
    there, back = (place + first) % q.shape[2], (place - first) % q.shape[2]
    return _at(attend(_at(q, there), _at(k, there), _at(v, there), mask.gather(1, there)), back)


def _at(x: Float[Tensor, "b h n d"], places: Tensor) -> Float[Tensor, "b h n d"]:
    return x.gather(2, places[:, None, :, None].expand_as(x))
