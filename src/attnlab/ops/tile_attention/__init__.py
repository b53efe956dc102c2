r"""Softmax attention inside tiles: each tile names its queries and its keys, whichever these are.

Windows, neighbourhoods, clusters, sorted bins and selected blocks are all of this form: what differs is who names the tokens.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.backends import Op
from attnlab.ops.chunks import common_dtype
from attnlab.ops.partials import Partial
from attnlab.ops.tile_attention import frame, reference
from attnlab.ops.triton_launch import UNTRIED, WIDEST, limits

OP = Op(
    "tile_attention",
    {"reference": reference.attend, "eager": frame.attend, "triton": functools.partial(frame.attend, backend="triton")},
    limits={"triton": limits((torch.float32, torch.bfloat16), WIDEST)},
    untried={"triton": UNTRIED},
)
"""The implementations, which take every argument, the bias with all its axes."""

OUTSIDE = ("masked", "zero")


def tile_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    queries: Int[Tensor, "#b #h t x"],
    keys: Int[Tensor, "#b #h t y"],
    *,
    bias: Float[Tensor, "#h kinds x y"] | None = None,
    kind: Int[Tensor, "t"] | None = None,
    causal: bool = False,
    key_mask: Bool[Tensor, "b m"] | None = None,
    outside: str = "masked",
    scale: float | None = None,
    backend: str = "auto",
) -> Partial:
    r"""Softmax attention of the queries of each tile over the keys of the same tile, with the log-sum-exp.

    $$s_{txy} = s\, q_{I_{tx}}^\top k_{J_{ty}} + B_{\kappa(t) x y}, \qquad
      o_{tx} = \sum_y e^{s_{txy} - \mathrm{lse}_{tx}}\, v_{J_{ty}}, \qquad \mathrm{lse}_{tx} = \log \sum_y e^{s_{txy}}$$

    I are ``queries`` and J are ``keys``: places in the sequence, -1 for none. A token may stand in any number of tiles, or in
    none; a key that a tile names twice counts twice. A query without a key, and a place without a query, has o = 0 and
    lse = -inf. Work O(t x y (d + e)); memory O(n + t (x e + y)) and that of some tiles at a time, backward too.

    Args:
        q: queries; h is a multiple of hk.
        k: keys; query head i reads key head i // (h / hk), and keys are not repeated in memory.
        v: values, of any width e.
        queries: I, the places of each tile's queries, alike for all examples or heads where that axis is 1.
        keys: J, likewise.
        bias: B, added to the scaled products, -inf for pairs that are left out; all of a tile's pairs, for each kind of tile.
        kind: $\kappa$, which kind each tile is; by default all are kind 0.
        causal: a query uses no key from a later place.
        key_mask: True marks a real key. What stands at the others has no influence, nan included.
        outside: what -1 among the keys is: "masked", or "zero", a key and a value of zeros that take part in the softmax.
        scale: s, by default $d^{-1/2}$.
        backend: "auto", "reference", "eager" or "triton".

    Returns:
        ``output`` (b, h, t, x, e) in the common dtype of q, k and v, and ``lse`` (b, h, t, x), both differentiable.

    Raises:
        TypeError: a tensor is not of the right dtype.
        ValueError: a shape does not fit the others, or ``outside`` is unknown. Places beyond the sequence are not looked for.
        BackendUnavailableError: an explicit ``backend`` cannot run here.
    """
    _check(q, k, v, queries, keys, bias, kind, key_mask, outside)
    q, k, v = common_dtype(q=q, k=k, v=v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if bias is not None and kind is None:
        kind = queries.new_zeros(queries.shape[2])
    if 0 in (queries.numel(), keys.numel(), q.numel(), k.numel()):
        shape = (*q.shape[:2], *queries.shape[2:])
        return Partial(q.new_zeros(*shape, v.shape[-1]), q.new_full(shape, float("-inf")))
    return Partial(*OP(backend, q)(q, k, v, queries, keys, bias, kind, causal, key_mask, outside == "zero", scale))


def from_tiles(x: Float[Tensor, "b h t x e"], inverse: Int[Tensor, "n"]) -> Float[Tensor, "b h n e"]:
    """What tiles hold for each token, where each token stands in one place: ``inverse`` is that place among all t x.

    Args:
        x: outputs of `tile_attention`.
        inverse: see `places_of`.
    """
    return x.flatten(2, 3).index_select(2, inverse)


def places_of(queries: Int[Tensor, "t x"], length: int) -> Int[Tensor, "n"]:
    """The place among all places of tiles where each of ``length`` tokens stands; -1 among ``queries`` is nobody's.

    Of a token that stands twice one place is taken, and -1, which cannot be read, is that of a token that stands nowhere.
    """
    flat = queries.flatten()
    places = torch.arange(flat.numel(), device=flat.device)
    inverse = torch.full((length + 1,), -1, dtype=torch.int64, device=flat.device)
    return inverse.scatter_(0, torch.where(flat < 0, length, flat), places)[:length]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    kind: Tensor | None,
    key_mask: Tensor | None,
    outside: str,
) -> None:
    """Raise for what `tile_attention` cannot take."""
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes (batch, heads, tokens, width), got shape {tuple(tensor.shape)}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected batch, heads and tokens of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k: expected the batch and width of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides the {q.shape[1]} of q, got {k.shape[1]}")
    for name, tensor in {"queries": queries, "keys": keys}.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64 places, got {tensor.dtype}")
        if tensor.ndim != 4 or tensor.shape[0] not in (1, q.shape[0]) or tensor.shape[1] not in (1, q.shape[1]):
            raise ValueError(
                f"{name}: expected (1 or batch, 1 or heads, tiles, places), got {tuple(tensor.shape)} for q {tuple(q.shape)}"
            )
    if queries.shape[2] != keys.shape[2]:
        raise ValueError(f"keys: expected the {queries.shape[2]} tiles of queries, got {keys.shape[2]}")
    if bias is not None and (bias.ndim != 4 or bias.shape[0] not in (1, q.shape[1])):
        raise ValueError(f"bias: expected (1 or heads, kinds, {queries.shape[3]}, {keys.shape[3]}), got {tuple(bias.shape)}")
    if bias is not None and bias.shape[2:] != (queries.shape[3], keys.shape[3]):
        raise ValueError(f"bias: expected {(queries.shape[3], keys.shape[3])} as its last axes, got {tuple(bias.shape)}")
    if kind is not None and (bias is None or kind.shape != queries.shape[2:3]):
        raise ValueError(f"kind: expected shape {tuple(queries.shape[2:3])}, and a bias, got {tuple(kind.shape)}")
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask: expected bool, True at real keys, got {key_mask.dtype}")
    if key_mask is not None and key_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_mask: expected shape {(k.shape[0], k.shape[2])} to fit k, got {tuple(key_mask.shape)}")
    if outside not in OUTSIDE:
        raise ValueError(f"outside: expected one of {OUTSIDE}, got {outside!r}")
