"""From multi-head to grouped-query attention: key and value heads of a trained mixer pooled in groups."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import create_mixer
from attnlab.mixers.attention import AttentionMixer

GROUPINGS = ("contiguous", "similar_keys")


def to_grouped(
    mixer: AttentionMixer,
    num_kv_heads: int,
    *,
    grouping: str | Sequence[int] = "contiguous",
    into: str = "softmax",
    **options: Any,
) -> AttentionMixer:
    """A grouped-query mixer whose key and value heads are means of those of a trained one (Ainslie et al. 2023, section 2.1).

    Queries and the output projection are copied. Query heads, with the columns of the output projection that belong to them,
    are put in the order of their groups, so that groups are contiguous; positions that give each head something of its own
    would follow wrongly and are refused unless the order stays.

    Args:
        mixer: attention whose ``num_kv_heads`` is a multiple of the new one; `SoftmaxAttention`, say.
        num_kv_heads: groups, all of the same size.
        grouping: "contiguous"; "similar_keys" (each group begins with the first head left and takes those whose key
            projections are nearest in cosine); or the group of each key head.
        into: name of the mixer to build: "softmax", "key_driven_gqa", "dynamic_gqa", ...
        **options: its own options.

    Raises:
        ValueError: for groups that do not fit, an unknown grouping, or a position that the order of heads would change,
            or a mixer with parameters of its own that the new one has not.
        UnknownNameError: for an unknown mixer or option.
    """
    heads, group = mixer.num_kv_heads, _groups(mixer, num_kv_heads, grouping)
    order = torch.sort(group, stable=True).indices
    moved = not torch.equal(order.cpu(), torch.arange(heads))
    if moved and mixer.position_name not in ("none", "rotary"):
        raise ValueError(f"grouping: expected 'contiguous' with position={mixer.position_name!r}, got {grouping!r}")
    weight = mixer.q_proj.weight
    built = create_mixer(
        into,
        mixer.dim,
        mixer.num_heads,
        causal=mixer.causal,
        num_kv_heads=num_kv_heads,
        head_dim=mixer.head_dim,
        context_dim=mixer.context_dim,
        qkv_bias=mixer.q_proj.bias is not None,
        out_bias=mixer.out_proj.bias is not None,
        qk_norm="layer_norm" if isinstance(mixer.q_norm, nn.LayerNorm) else "none",
        **{"device": weight.device, "dtype": weight.dtype, **options},
    )
    if not isinstance(built, AttentionMixer):
        raise ValueError(f"into: expected a mixer with projections of queries, keys and values, got {into!r}")
    # the trained position as it is, with its options
    built.position, built.position_name = copy.deepcopy(mixer.position), mixer.position_name
    state = _pooled(mixer, num_kv_heads, order)
    lost = sorted(set(state) - set(built.state_dict()))
    left = sorted({name for name, _ in built.named_parameters()} - set(state))
    if lost or left:
        raise ValueError(f"mixer: expected the parameters of {into!r}, got {lost} that it has not, and nothing for {left}")
    built.load_state_dict(state, strict=False)  # what is missing are buffers of statistics, which begin anew
    return built.train(mixer.training)


def _pooled(mixer: AttentionMixer, groups: int, order: Int[Tensor, " h"]) -> dict[str, Tensor]:
    """The mixer's tensors with its heads in this order, keys and values pooled."""
    state, width, heads = dict(mixer.state_dict()), mixer.head_dim, mixer.num_kv_heads
    per_key = mixer.num_heads // heads * width
    for part, rows in (("q_proj", per_key), ("k_proj", width), ("v_proj", width)):
        for name in (f"{part}.weight", f"{part}.bias"):
            if name in state:
                ordered = state[name].unflatten(0, (heads, rows))[order]
                state[name] = ordered.flatten(0, 1) if part == "q_proj" else pool_heads(ordered, groups)
    state["out_proj.weight"] = state["out_proj.weight"].unflatten(1, (heads, per_key))[:, order].flatten(1)
    return state


def pool_heads(heads: Float[Tensor, "h d ..."], groups: int) -> Float[Tensor, "hd ..."]:
    """The mean of each of ``groups`` runs of heads (h, d, ...), as rows of a projection (groups d, ...)."""
    return heads.unflatten(0, (groups, -1)).mean(dim=1).flatten(0, 1)


def _groups(mixer: AttentionMixer, count: int, grouping: str | Sequence[int]) -> Int[Tensor, " h"]:
    heads = mixer.num_kv_heads
    if count < 1 or heads % count:
        raise ValueError(f"num_kv_heads: expected a divisor of the mixer's {heads}, got {count}")
    if not isinstance(grouping, str):
        if len(grouping) != heads or any(list(grouping).count(g) != heads // count for g in range(count)):
            raise ValueError(f"grouping: expected each of 0 to {count - 1} for {heads // count} of {heads} heads, got {grouping}")
        return torch.tensor(list(grouping))
    if grouping not in GROUPINGS:
        raise ValueError(f"grouping: expected one of {GROUPINGS} or a group for each head, got {grouping!r}")
    if grouping == "contiguous":
        return torch.arange(heads) // (heads // count)
    return _by_similarity(mixer.k_proj.weight.detach().unflatten(0, (heads, -1)).flatten(1).cpu(), count)


def _by_similarity(keys: Float[Tensor, "h p"], count: int) -> Int[Tensor, " h"]:
    """Greedy groups of equal size: the first head left, and those nearest to it in cosine."""
    units = torch.nn.functional.normalize(keys.double(), dim=1)
    likeness, group = units @ units.T, torch.full((len(keys),), -1)
    for one in range(count):
        left = (group < 0).nonzero().squeeze(1)
        nearest = likeness[left[0], left].masked_fill(left == left[0], float("inf"))
        group[left[nearest.argsort(descending=True, stable=True)[: len(keys) // count]]] = one
    return group
