"""HyperAttention's float32 path on given queries, keys and values, with the recorded directions and samples."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.core.masks import Masks
from attnlab.ops.partials import Partial, merge
from golden.recording import Recording

PROVES = ("mixer:hyper_attention",)


def _join(first: Partial, second: Partial) -> Partial:
    """Two parts as one; theirs adds float32's eps to the share of the first, which tells where that is small."""
    both = merge(first, second)
    share = (first.lse - both.lse).exp()
    lse = both.lse + (share / (share + torch.finfo(torch.float32).eps)).log()
    return Partial(both.output, torch.where(second.lse == float("-inf"), both.lse, lse))


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    options, heads = config["ctor"], config["H"]
    mixer = create_mixer(
        "hyper_attention",
        heads * options["input_dim"],
        heads,
        block=options["block_size"],
        num_samples=options["sample_size"],
        num_projections=options["lsh_num_projs"],
        min_exact=options["min_seq_len"],
        border="zero_keys",
        hide_later=config.get("causal", False),
    ).to(recording.dtype)
    with torch.no_grad():
        mixer.hash.directions.copy_(recording[f"param/{name}.lsh.proj_dir"][0, 0])
    q, k, v = (recording.leaf(f"in/{name}.{part}") for part in "qkv")
    drawn = []
    while f"in/{name}.sampled{len(drawn)}" in recording:
        # theirs have the pairs of halves as further heads
        drawn.append(recording[f"in/{name}.sampled{len(drawn)}"].unflatten(1, (heads, -1)))
    out, lse = mixer.estimate(q, k, v, Masks(), drawn, _join)
    (out * recording[f"in/{name}.w"]).sum().backward()
    results = {f"out/{name}.out": out, f"out/{name}.lse": lse.unsqueeze(-1)}
    results |= {f"out/{name}.hash_{part}": mixer.hash(x) for part, x in (("q", q), ("k", k))}
    return results | {f"grad/{name}.{part}": x.grad for part, x in zip("qkv", (q, k, v), strict=True)}


def run(recording: Recording) -> dict[str, Tensor]:
    """Every recorded configuration."""
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
