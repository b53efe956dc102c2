"""What every implementation of tile attention is given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The tensors and rules of a call; see `attnlab.ops.tile_attention.tile_attention`.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, hk, m, d).
        v: values (b, hk, m, e).
        queries: places of the queries of each tile (1 or b, 1 or h, t, x), -1 for none.
        keys: places of its keys (1 or b, 1 or h, t, y), likewise.
        bias: (1 or h, kinds, x, y), or None.
        kind: which kind each tile is (t,); None without a bias.
        key_mask: (b, m), True marks a real key.
        causal: no key from a later place.
        zero_outside: -1 among the keys is a key and a value of zeros.
        scale: factor of the products.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    queries: Tensor
    keys: Tensor
    bias: Tensor | None
    kind: Tensor | None
    key_mask: Tensor | None
    causal: bool
    zero_outside: bool
    scale: float


class Given(NamedTuple):
    """What backward starts from: both results of forward, and the gradients that came for them."""

    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor
