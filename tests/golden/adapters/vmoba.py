"""Video block attention on given queries, keys and values: frames, tiles and cubes, by threshold and by number."""

from __future__ import annotations

from torch import Tensor

from attnlab import create_mixer
from attnlab.core.masks import Masks
from golden.recording import Recording

PROVES = ("mixer:mixture_of_block",)

_SCOPES = {"query_head": "query", "head_global": "head", "overall": "example", "block": "block"}


def _run(recording: Recording, name: str, config: dict) -> dict[str, Tensor]:
    by_number = config["mode"] == "topk"
    mixer = create_mixer(
        "mixture_of_block",
        config["H"] * config["D"],
        config["H"],
        block=config["chunk"],
        top_k=config["topk"] if by_number else None,
        threshold=config.get("thr", 0.0),
        scope=_SCOPES[config["type"]],
    )
    q, k, v = (recording.leaf(f"in/{name}.{part}") for part in "qkv")
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out = mixer.attend(*heads, Masks(), tuple(config["res"])).transpose(1, 2)
    (out * recording[f"in/{name}.w"]).sum().backward()
    return {f"out/{name}.out": out} | {f"grad/{name}.{part}": x.grad for part, x in zip("qkv", (q, k, v), strict=True)}


def run(recording: Recording) -> dict[str, Tensor]:
    """Every recorded configuration."""
    results: dict[str, Tensor] = {}
    for name, config in recording.config.items():
        results |= _run(recording, name, config)
    return results
