"""Masks: boolean, True means "take part", everywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Masks(NamedTuple):
    """The masks of a call as a mixer's own methods see them; None allows everything.

    Args:
        query: (b, n), which queries are real tokens.
        key: (b, m), which keys may be used: those of the context if there is one.
        pair: (b or 1, h or 1, n, m), which query may use which key.
    """

    query: Bool[Tensor, "b n"] | None = None
    key: Bool[Tensor, "b m"] | None = None
    pair: Bool[Tensor, "#b #h n m"] | None = None

    def allowed(self, num_queries: int, num_keys: int, *, causal: bool, device: torch.device) -> Tensor | None:
        """The pairs (#b, #h, #n, #m) that causality and the masks of keys and pairs allow; None for all."""
        return allowed_pairs(num_queries, num_keys, causal=causal, key_mask=self.key, pair_mask=self.pair, device=device)


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a mask that is not boolean (TypeError) or not of ``shape`` (ValueError)."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a boolean tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name}: expected dtype torch.bool (True = take part), got {mask.dtype}; compare first, e.g. `{name} > 0`"
        )
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(mask.shape)}")


def check_pair_mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> None:
    """Like `check_mask` for (batch or 1, heads or 1, queries, keys)."""
    if mask is None:
        return
    if isinstance(mask, Tensor) and mask.dim() == 4:
        shape = (
            1 if mask.shape[0] == 1 else shape[0],
            1 if mask.shape[1] == 1 else shape[1],
            shape[2],
            shape[3],
        )
    check_mask("pair_mask", mask, shape)


def zero_masked(x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n c"]:
    """``x`` with exact zeros at masked tokens; what stood there, NaN too, has no influence and gets no gradient."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


def causal_pairs(num_queries: int, num_keys: int, device: torch.device | None = None) -> Bool[Tensor, "n m"]:
    """Key j is allowed for query i if j <= i + num_keys - num_queries: the last query sees every key."""
    rows = torch.arange(num_queries, device=device).unsqueeze(1) + (num_keys - num_queries)
    return torch.arange(num_keys, device=device).unsqueeze(0) <= rows


def allowed_pairs(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
    pair_mask: Bool[Tensor, "#b #h n m"] | None,
    device: torch.device,
) -> Bool[Tensor, "#b #h #n m"] | None:
    """The three masks as one, or None where every pair is allowed; only the dimensions that are needed are materialised."""
    allowed = None
    if key_mask is not None:
        allowed = key_mask[:, None, None, :]
    if pair_mask is not None:
        allowed = pair_mask if allowed is None else allowed & pair_mask
    if causal and num_queries > 1:
        triangle = causal_pairs(num_queries, num_keys, device)[None, None]
        allowed = triangle if allowed is None else allowed & triangle
    return allowed


def answered_queries(
    x: Float[Tensor, "b n c"],
    num_keys: int,
    *,
    causal: bool,
    mask: Bool[Tensor, "b n"] | None,
    key_mask: Bool[Tensor, "b m"] | None,
    pair_mask: Bool[Tensor, "#b #h n m"] | None,
) -> Bool[Tensor, "b n"] | None:
    """True at real tokens that have a key to use in some head, or None where all have."""
    batch, n = x.shape[:2]
    if pair_mask is None and (key_mask is None or key_mask is mask):
        return mask  # a real token may always use itself
    allowed = allowed_pairs(n, num_keys, causal=causal, key_mask=key_mask, pair_mask=pair_mask, device=x.device)
    if allowed is None:
        return mask
    answered = allowed.any(dim=-1).any(dim=1).expand(batch, n)
    return answered if mask is None else answered & mask


def token_positions(
    batch: int, n: int, mask: Bool[Tensor, "b n"] | None, *, start: Int[Tensor, "b"] | None = None, device: torch.device
) -> Int[Tensor, "#b n"]:
    """The index of each token among the real ones of its sequence; a masked token has that of the real one before it, or 0.

    Args:
        batch: examples.
        n: tokens.
        mask: (batch, n), True marks a real token.
        start: real tokens that came before, per example.
        device: where to count.
    """
    if mask is None:
        positions = torch.arange(n, device=device)[None]
    else:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    return positions if start is None else positions + start[:, None]
