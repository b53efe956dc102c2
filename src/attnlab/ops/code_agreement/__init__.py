r"""The keys whose codes agree best with those of a query: an integer top-k over all pairs that writes no pair down."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnlab.ops.backends import Op
from attnlab.ops.code_agreement import eager, reference

OP = Op("code_agreement", {"reference": reference.select, "eager": eager.select})
"""The implementations, which take every argument."""


def agreeing_keys(
    queries: Int[Tensor, "b h n p"],
    keys: Int[Tensor, "b h m p"],
    num_codes: int,
    count: int,
    *,
    steps: int = 3,
    causal: bool = False,
    key_mask: Bool[Tensor, "b m"] | None = None,
    backend: str = "auto",
) -> Int[Tensor, "b h n c"]:
    r"""The places of the ``count`` keys that agree with each query in most parts, counted in steps; of equal ones the first.

    $$c_{ij} = \#\{p : a_{ip} = b_{jp}\}, \qquad
      t_{ij} = \min\big(T, \lfloor c_{ij} / \max(1, \lfloor P / (T + 1) \rfloor) \rfloor\big)$$

    Keys are ordered by $t_{ij}$ from the largest, then by place. As sets of bits: time O(n m P log P / 64) in words, memory
    O(m P E / 8 + n c).

    Args:
        queries: a, the codes of P parts of each query, 0 to E - 1.
        keys: b, those of each key.
        num_codes: E.
        count: how many keys at most.
        steps: T.
        causal: a query uses no key from a later place.
        key_mask: True marks a real key.
        backend: "auto", "reference" or "eager".

    Returns:
        (b, h, n, min(count, m)), the places in no order that is promised, -1 for none.

    Raises:
        TypeError: codes are not int64.
        ValueError: a shape or a number does not fit.
        BackendUnavailableError: an explicit ``backend`` cannot run here.
    """
    for name, codes in {"queries": queries, "keys": keys}.items():
        if codes.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64 codes, got {codes.dtype}")
    if queries.ndim != 4 or queries.shape[:2] != keys.shape[:2] or queries.shape[3] != keys.shape[3]:
        raise ValueError(f"keys: expected batch, heads and parts of queries {tuple(queries.shape)}, got {tuple(keys.shape)}")
    if min(num_codes, count, steps) < 1:
        raise ValueError(f"num_codes, count, steps: expected at least 1, got {num_codes}, {count}, {steps}")
    if key_mask is not None and key_mask.shape != (len(keys), keys.shape[2]):
        raise ValueError(f"key_mask: expected {(len(keys), keys.shape[2])}, got {tuple(key_mask.shape)}")
    found: Tensor = OP(backend, queries)(queries, keys, num_codes, min(count, keys.shape[2]), steps, causal, key_mask)
    return found
