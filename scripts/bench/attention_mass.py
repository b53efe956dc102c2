"""How much of dense attention's mass sparse mechanisms keep with their published defaults, on random and on trained inputs.

Small models with softmax attention are trained from several seeds (`mass_sources.py`). Each mechanism of the families of sparse
attention then takes the place of the trained layer whose attention is most concentrated: the layer's projections are copied into
it, whatever else it has stays as it was built, and the mass of the dense weights on the pairs that it uses is measured on
held-out tokens. "random" is the same between layers as they are built, on normal tokens.

    python scripts/bench/attention_mass.py [names] [--seeds 3] [--out docs/data/attention_mass.json]

What the file already holds of the same set-up is kept, so that a run that was stopped goes on, and new mechanisms are added.
Opening the photographs takes Pillow.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from mass_sources import DEPTH, DIM, HEADS, SOURCES, Source, trained_layers
from torch import Tensor

from attnlab import create_mixer, list_mixers, mixer_info
from attnlab.core.errors import UnsupportedError
from attnlab.core.grid import Grid
from attnlab.mixers.attention import AttentionMixer
from attnlab.mixers.dense.softmax import SoftmaxAttention
from attnlab.ops.maps.mass import kept_mass

FAMILIES = ("local", "partitioned", "sparse")
OUT = Path(__file__).parents[2] / "docs" / "data" / "attention_mass.json"
SAME = 1e-4
"""Weights and projections that differ by less are the same."""
PROJECTIONS = ("q_proj.weight", "k_proj.weight")


class NotComparable(Exception):
    """Why a mechanism cannot take the place of a layer of softmax attention."""


@dataclass(frozen=True)
class Layer:
    """A layer of softmax attention, what it sees, and its weights.

    Args:
        mixer: the layer.
        x: tokens.
        grid: sides; None for a sequence.
        weights: of the tokens.
    """

    mixer: AttentionMixer
    x: Float[Tensor, "b n c"]
    grid: Grid | None
    weights: Float[Tensor, "b h n n"]


@dataclass(frozen=True)
class Kept:
    """What a mechanism keeps.

    Args:
        mass: of the dense weights, on the pairs that it uses.
        pairs: the share of the pairs that it uses.
        overlap: the mass that both put in the same places, the sum over keys of the smaller of both weights.
        same: its weights are the dense ones.
    """

    mass: float
    pairs: float
    overlap: float
    same: bool


def layer(mixer: AttentionMixer, x: Float[Tensor, "b n c"], grid: Grid | None) -> Layer:
    """A layer with its weights."""
    with torch.no_grad():
        return Layer(mixer, x, grid, mixer.mixing_matrix(x))


def entropy(weights: Float[Tensor, "b h n n"], causal: bool) -> list[float]:
    """A head's mean over queries of the entropy, in shares of that of equal weights on all keys that the query may have."""
    n = weights.shape[-1]
    most = torch.arange(1, n + 1).double().log() if causal else torch.full((n,), math.log(n), dtype=torch.float64)
    shares = torch.special.entr(weights.double()).sum(-1)[..., 1:] / most[1:]  # the first query may have one key alone
    return [float(share) for share in shares.mean((0, 2))]


def replacement(name: str, of: Layer) -> AttentionMixer:
    """A mechanism with its defaults and the projections of a layer.

    Raises:
        NotComparable: if it has no map between tokens, or other queries and keys.
    """
    info, source = mixer_info(name), of.mixer
    option = info.supports.tokens_option
    fixed = {} if option is None else {option: of.x.shape[1]}
    try:
        mixer = create_mixer(name, DIM, HEADS, causal=source.causal, **fixed).eval()
    except (ValueError, TypeError) as error:
        raise NotComparable(f"cannot be built with the layer's sizes: {error}") from error
    if not mixer.supports.mixing_matrix:
        raise NotComparable("no single map between tokens multiplies its values")
    own, given = mixer.state_dict(), source.state_dict()
    if not isinstance(mixer, AttentionMixer) or any(key not in own for key in PROJECTIONS):
        raise NotComparable("it makes its weights of other things than projected queries and keys")
    if any(own[key].shape != given[key].shape for key in PROJECTIONS):
        raise NotComparable("its queries and keys have other widths than the layer's")
    none = {key: torch.zeros_like(own[key]) for key in ("q_proj.bias", "k_proj.bias") if key in own}
    mixer.load_state_dict(own | none | {key: given[key] for key in PROJECTIONS})
    with torch.no_grad():
        pairs = zip(mixer.project(of.x)[:2], source.project(of.x)[:2], strict=True)
        if any(ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=SAME) for ours, theirs in pairs):
            raise NotComparable("it makes other queries and keys of the same projections")
    return mixer


def measure(name: str, of: Layer) -> Kept:
    """What a mechanism keeps of a layer's weights.

    Raises:
        NotComparable: if it cannot take the layer's place.
    """
    mixer = replacement(name, of)
    try:
        with torch.no_grad():
            weights = mixer.mixing_matrix(of.x, grid=of.grid)
    except (UnsupportedError, ValueError) as error:
        raise NotComparable(f"refuses these tokens: {error}") from error
    n, causal = of.x.shape[1], of.mixer.causal
    allowed = n * (n + 1) // 2 if causal else n * n
    used = weights != 0
    return Kept(
        mass=float(kept_mass(of.weights, used).mean()),
        pairs=float(used.double().sum((-2, -1)).mean() / allowed),
        overlap=float(torch.minimum(of.weights, weights).sum(-1).mean()),
        same=torch.allclose(of.weights, weights, atol=SAME),
    )


def mechanisms(source: Source) -> list[str]:
    """Those that take the source's shape, in its form."""
    rank = 1 if source.grid is None else len(source.grid)
    found = []
    for name in (name for family in FAMILIES for name in list_mixers(family=family)):
        supports = mixer_info(name).supports
        if rank in supports.grid and supports.causal != ("no" if source.causal else "always"):
            found.append(name)
    return found


def build(source: Source, seed: int) -> tuple[Layer, dict[str, Any]]:
    """A layer as it is built, on normal tokens, and how concentrated its attention is."""
    torch.manual_seed(seed)
    mixer = SoftmaxAttention(DIM, HEADS, causal=source.causal).eval()
    found = layer(mixer, torch.randn(1, source.tokens, DIM), source.grid)
    return found, {"entropy": entropy(found.weights, source.causal)}


def train(source: Source, seed: int) -> tuple[Layer, dict[str, Any]]:
    """The most concentrated layer of a trained model on held-out tokens, how concentrated it is, and the model's loss."""
    seen, bits = trained_layers(source, seed)
    layers = [layer(mixer, x, source.grid) for mixer, x in seen]
    entropies = [entropy(one.weights, source.causal) for one in layers]
    best = min(range(len(layers)), key=lambda index: sum(entropies[index]))
    return layers[best], {"entropy": entropies[best], "layer": best + 1, "bits": bits}


def setup(source: Source) -> dict[str, Any]:
    """What the rows of a source depend on, and what a reader must know of it."""
    return {
        "says": source.says,
        "tokens": source.tokens,
        "causal": source.causal,
        "grid": source.grid and list(source.grid),
        "stages": [list(stage) for stage in source.stages],
        "rate": source.rate,
        "std": source.std,
        "dim": DIM,
        "num_heads": HEADS,
        "depth": DEPTH,
    }


def known(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The entry of a source: the one that there is, if its set-up is today's, or an empty one."""
    wanted, entry = setup(SOURCES[name]), data.get(name, {})
    return entry if entry.get("setup") == wanted else {"setup": wanted, "seeds": {}}


def fill(entry: dict[str, Any], source: Source, seed: int, names: Iterable[str]) -> Iterator[str]:
    """Measure what a source's entry lacks of these mechanisms at a seed; a line each."""
    found = entry["seeds"].setdefault(str(seed), {"mixers": {}})
    missing = [name for name in names if name not in found["mixers"]]
    if not missing:
        return
    made = {kind: (train if kind == "trained" else build)(source, seed) for kind in ("random", "trained")}
    found.update({kind: facts for kind, (_, facts) in made.items()})
    for name in missing:
        torch.manual_seed(seed)
        try:
            row = {kind: asdict(measure(name, of)) for kind, (of, _) in made.items()}
            said = ", ".join(f"{kind} {kept['mass']:.3f}" for kind, kept in row.items())
        except NotComparable as error:
            row, said = {"reason": str(error)}, str(error)  # type: ignore[dict-item]
        found["mixers"][name] = row
        yield f"{name:24s} {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of dense attention's mass that sparse mechanisms keep.")
    parser.add_argument("names", nargs="*", help="mechanisms; all of the families of sparse attention without any")
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, seed in product(options.sources, range(options.seeds)):
        data = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        data = {source: known(data, source) for source in SOURCES}
        entry = data[name]
        names = [one for one in mechanisms(SOURCES[name]) if not options.names or one in options.names]
        print(f"{name}, seed {seed}", flush=True)
        for line in fill(entry, SOURCES[name], seed, names):
            print(f"  {line}", flush=True)
            options.out.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
