"""The selection rules of the Sparse Frontier's prefill, decode and cache policies."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.mixers.parts.selection import block_means
from attnlab.mixers.sparse.frontier_rules import (
    block_sparsity,
    blocks_for,
    cache_capacities,
    cache_importance,
    line_scores,
    page_bounds,
    page_scores,
    ranked_blocks,
    ranked_lines,
)
from attnlab.ops.attention import attention_map
from golden.recording import Recording

PROVES = ("mixer:sparse_prefill", "mixer:quest", "mixer:snap_kv")


def last_weights(q: Tensor, k: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The last queries' causal attention (1, h, count, n), and where they stand."""
    n = k.shape[2]
    places = torch.arange(n - count, n)[None]
    pairs = (torch.arange(n) <= places[..., None])[:, None]
    return attention_map(q[:, :, -count:], k, pair_mask=pairs), places


def _prefill(recording: Recording) -> dict[str, Tensor]:
    config, q, k = recording.config, recording["in/pre.q"], recording["in/pre.k"]
    blocks = q.shape[2] // config["bs"]
    chosen = ranked_blocks(block_means(q, config["bs"])[0], block_means(k, config["bs"])[0], config["topk"])
    recorded = recording["out/block.index"]
    # where fewer blocks are allowed than asked for, the authors' list goes on with later ones, which their kernel masks
    for i in range(min(blocks, config["topk"] - 1)):
        chosen[:, :, i] = torch.where(chosen[:, :, i] < 0, i + 1, chosen[:, :, i])
        later = recorded[:, :, i].sort(-1).values[..., i + 1 :]
        assert bool((later > i).all())
        chosen[:, :, i] = torch.cat((chosen[:, :, i].sort(-1).values[..., : i + 1], later), -1)
    weights, places = last_weights(q[:, :1], k[:, :1], config["approx"])
    near = {"vertical": 4, "slash": 64}
    results = {"out/block.index": chosen.sort(-1).values.int()}
    for (name, forced), scores in zip(near.items(), line_scores(weights, places), strict=True):
        first = (torch.arange(k.shape[2]) < forced)[None]
        lines = ranked_lines(scores, first, k.shape[2], mass=config["alpha"], least=config["min_budget"])
        results[f"out/flex.{name}"] = lines[lines >= 0].sort().values[None, None]
    results["out/block.sparsity"] = torch.tensor(block_sparsity(blocks, config["topk"]))
    results["out/block.blocks_for_half"] = torch.tensor(blocks_for(1024 // config["bs"], 0.5))
    return results


def _pages(recording: Recording) -> dict[str, Tensor]:
    config, results = recording.config, {}
    q, k = (recording[name].transpose(0, 1)[None] for name in ("in/quest.query", "in/kv.k"))
    low, high, _ = page_bounds(k, config["page"], None)
    current = low.shape[2] - 1
    for share in (False, True):
        scores = page_scores(q, low, high, share=share)[0, :, 0, :current]
        pages = scores.topk(config["page_budget"], dim=-1).indices
        pages = torch.cat((pages, torch.full_like(pages[:, :1], current)), dim=-1)
        results[f"out/quest.pages_share{int(share)}"] = pages.int()
        results[f"out/quest.len_share{int(share)}"] = torch.full((len(pages),), pages.shape[1] * config["page"]).int()
    return results


def _caches(recording: Recording) -> dict[str, Tensor]:
    q, k, v = (recording[f"in/kv.{name}"].transpose(0, 1)[None] for name in "qkv")
    results = {}
    for name, config in (("snapkv", recording.config["snap"]), ("adasnapkv", recording.config["ada"])):
        weights = last_weights(q, k, config["approximation_window"])[0].unflatten(1, (k.shape[1], -1))
        scores = cache_importance(weights, config["kernel_size"], largest=name == "adasnapkv")
        scores[..., : config["prefix_tokens"]] = scores[..., -config["local_window"] :] = float("inf")
        if name == "snapkv":
            places = scores.topk(config["token_capacity"], dim=-1).indices
            lengths = (places >= 0).sum(-1)
        else:
            least = int(config["min_head_capacity_ratio"] * config["token_capacity"])
            least = max(least, config["local_window"] + config["prefix_tokens"])
            places, lengths = cache_capacities(scores, config["token_capacity"], least)
            places = places[..., : int(lengths.max())]
        index = places.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
        for key, x in (("k", k), ("v", v)):
            results[f"out/{name}.{key}"] = x.gather(2, index).masked_fill((places < 0).unsqueeze(-1), 0.0)[0]
        results[f"out/{name}.len"] = lengths[0]
    return results


def run(recording: Recording) -> dict[str, Tensor]:
    """Every rule."""
    return _prefill(recording) | _pages(recording) | _caches(recording)
