"""Indicators of attention maps, as pure functions of the map."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.masks import causal_pairs, check_mask


def attention_entropy(
    map: Float[Tensor, "b h n m"],
    *,
    query_mask: Bool[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h"]:
    r"""$\mathrm{mean}_i\,(-\sum_j A_{ij} \ln A_{ij})$ a head (Zhai et al. 2023), with $0 \ln 0 = 0$.

    Args:
        map: the weights (b, h, n, m).
        query_mask: (b, n), True marks a real query.
        key_mask: (b, m), True marks a real key.

    Returns:
        In nats, (b, h): between 0 (one key a query) and $\ln m$ (all alike); 0 for a head without any row.
    """
    kept, rows = _kept(map, query_mask, key_mask)
    # the inner exchange keeps the gradient of x ln x at an exact zero from being 0 times infinity
    logs = kept.masked_fill(kept == 0, 1.0).log()
    return _mean(-(kept * logs).sum(dim=-1), rows)


def entropy_lower_bound(spectral_norm: Float[Tensor, "*s"] | float | int, num_keys: int) -> Float[Tensor, "*s"]:
    r"""The least entropy of softmax over N logits of spectral norm s (Zhai et al. 2023).

    $$\ln(1 + (N-1)\beta) + \frac{s\sqrt{N(N-1)}\,\beta}{1 + (N-1)\beta}, \qquad \beta = e^{-s\sqrt{N/(N-1)}}$$

    It is reached by a row of logits of length s of which one stands out, and falls exponentially with s.

    Args:
        spectral_norm: s, of the matrix of scaled logits; a number or a tensor.
        num_keys: N, at least 1.

    Raises:
        ValueError: if ``num_keys`` is less than 1.
    """
    if num_keys < 1:
        raise ValueError(f"num_keys: expected at least 1, got {num_keys}")
    s = torch.as_tensor(spectral_norm, dtype=None if isinstance(spectral_norm, Tensor) else torch.float64)
    if num_keys == 1:
        return torch.zeros_like(s)
    others = num_keys - 1
    beta = torch.exp(-s * math.sqrt(num_keys / others))
    total = 1 + others * beta
    return total.log() + s * math.sqrt(num_keys * others) * beta / total


def concentration(
    map: Float[Tensor, "b h n m"],
    *,
    query_mask: Bool[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h"]:
    r"""$\lVert A \rVert_F$ a head, (b, h). Arguments as for `attention_entropy`."""
    return torch.linalg.vector_norm(_kept(map, query_mask, key_mask)[0], dim=(-2, -1))


def head_diversity(
    map: Float[Tensor, "b h n m"],
    *,
    causal: bool = False,
    query_mask: Bool[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, " b"]:
    r"""$\mathrm{mean}_{ij}\, \mathrm{std}_h A_{hij}$ over the pairs that count, (b,); the deviation divides by h, one head has 0.

    Args:
        map: the weights (b, h, n, m).
        causal: count only pairs whose key does not stand after the query: $2/(n(n+1))$ times their sum where n = m.
        query_mask: (b, n), True marks a real query.
        key_mask: (b, m), True marks a real key.
    """
    kept, _ = _kept(map, query_mask, key_mask)
    b, _, n, m = map.shape
    pairs = causal_pairs(n, m, map.device) if causal else torch.ones(n, m, dtype=torch.bool, device=map.device)
    pairs = pairs.expand(b, -1, -1)
    if query_mask is not None:
        pairs = pairs & query_mask[:, :, None]
    if key_mask is not None:
        pairs = pairs & key_mask[:, None, :]
    spread = kept.var(dim=1, correction=0)
    spread = spread.masked_fill(spread == 0, 1.0).sqrt().masked_fill((spread == 0) | ~pairs, 0.0)  # a root that can be derived
    return spread.sum(dim=(-2, -1)) / pairs.sum(dim=(-2, -1)).clamp(min=1)


def sink(
    map: Float[Tensor, "b h n m"],
    *,
    query_mask: Bool[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h"]:
    r"""$\mathrm{mean}_i A_{i1}$, the weight of the first real key, (b, h). Arguments as for `attention_entropy`."""
    kept, rows = _kept(map, query_mask, key_mask)
    first = torch.zeros(map.shape[0], dtype=torch.int64, device=map.device)
    if key_mask is not None:
        first = key_mask.int().argmax(dim=-1)
    index = first[:, None, None, None].expand(*map.shape[:3], 1)
    return _mean(kept.gather(-1, index).squeeze(-1), rows)


def local_focus(
    map: Float[Tensor, "b h n m"],
    distance: int = 0,
    *,
    query_mask: Bool[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h"]:
    r"""$\mathrm{mean}_i A_{i,i-N}$, the mean of the N-th subdiagonal, (b, h).

    Args:
        map: the weights (b, h, n, m).
        distance: N, how many places before the query the key stands; 0 is the query's own.
        query_mask: (b, n), True marks a real query.
        key_mask: (b, m), True marks a real key; a query whose key at that distance is masked does not count.

    Raises:
        ValueError: if ``distance`` is negative.
    """
    if distance < 0:
        raise ValueError(f"distance: expected 0 or more, got {distance}")
    kept, rows = _kept(map, query_mask, key_mask)
    n, m = map.shape[2:]
    keys = torch.arange(n, device=map.device) + (m - n - distance)
    there, keys = (keys >= 0) & (keys < m), keys.clamp(0, m - 1)
    weights = kept.gather(-1, keys[:, None].expand(*map.shape[:3], 1)).squeeze(-1)
    if key_mask is not None:
        there = there & key_mask[:, keys][:, None]
    return _mean(weights, rows & there)


def _kept(
    map: Tensor, query_mask: Tensor | None, key_mask: Tensor | None
) -> tuple[Float[Tensor, "b h n m"], Bool[Tensor, "b h n"]]:
    """The map with zeros at masked tokens, and which rows have a weight."""
    if map.dim() != 4:
        raise ValueError(f"map: expected 4 dimensions (b, h, n, m), got {tuple(map.shape)}")
    b, _, n, m = map.shape
    check_mask("query_mask", query_mask, (b, n))
    check_mask("key_mask", key_mask, (b, m))
    if query_mask is not None:
        map = map.masked_fill(~query_mask[:, None, :, None], 0.0)
    if key_mask is not None:
        map = map.masked_fill(~key_mask[:, None, None, :], 0.0)
    return map, (map != 0).any(dim=-1)


def _mean(values: Float[Tensor, "b h n"], rows: Bool[Tensor, "b h n"]) -> Float[Tensor, "b h"]:
    """The mean over the rows that count; 0 where none does."""
    return values.masked_fill(~rows, 0.0).sum(dim=-1) / rows.sum(dim=-1).clamp(min=1)
