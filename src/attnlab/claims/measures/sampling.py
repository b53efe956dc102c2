"""How near HyperAttention comes to softmax attention with the keys that it sorts and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.claims.cells import Cells
from attnlab.claims.quantity import Measured, over
from attnlab.core.masks import Masks
from attnlab.mixers.sparse.hyper_attention import HyperAttention
from attnlab.ops.attention import attention_map


def clustered(
    tokens: int, width: int, clusters: int, spread: float, generator: torch.Generator
) -> tuple[Float[Tensor, "1 1 n d"], Float[Tensor, "1 1 n d"]]:
    """Queries and keys around the same centres of unit variance, ``spread`` being the deviation around them."""
    centres = torch.randn(clusters, width, generator=generator, dtype=torch.float64)
    q, k = (
        centres[torch.randint(clusters, (tokens,), generator=generator)]
        + spread * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    return q[None, None], k[None, None]


def samples_and_blocks(
    cells: Cells, *, tokens: int, head_dim: int, samples: Sequence[int], block: int, clusters: int, spread: float, draws: int
) -> Measured:
    """The spectral norm of the error over those of the softmax matrix and of the values, as the paper bounds it.

    On Gaussian queries and keys with samples alone (a block of one key); on clustered ones with as many keys from samples alone
    and from a block and samples together, half each.

    Quantities: "exponent", how the error goes with the number of samples, least squares over their logarithms; "scattered",
    the error on Gaussian ones at the most samples; "gain", on clustered ones the error of samples alone over that of both.

    Args:
        cells: keeps each draw.
        tokens: queries, and keys.
        head_dim: width of them.
        samples: numbers of samples, rising.
        block: keys of a block, and samples beside it.
        clusters: centres.
        spread: deviation around them.
        draws: random inputs, directions and samples.
    """

    def measure(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 1, tokens, head_dim, generator=generator, dtype=torch.float64) for _ in range(3))
        errors = relative_errors(q, k, v, [(1, count) for count in samples], seed)
        q, k = clustered(tokens, head_dim, clusters, spread, generator)
        alone, both = relative_errors(q, k, v, [(1, 2 * block), (block, block)], seed)
        return {"samples": errors, "alone": alone, "both": both}

    settings = {"tokens": tokens, "head_dim": head_dim, "samples": list(samples), "block": block, "clusters": clusters}
    settings["spread"] = spread  # type: ignore[assignment]
    runs: list[Mapping[str, Any]] = [
        cells(f"HyperAttention's error, draw {seed}", {**settings, "seed": seed}, lambda seed=seed: measure(seed))  # type: ignore[misc]
        for seed in range(draws)
    ]
    quantities = {
        "exponent": over([slope([float(count) for count in samples], run["samples"]) for run in runs]),
        "scattered": over([run["samples"][-1] for run in runs]),
        "gain": over([run["alone"] / run["both"] for run in runs]),
    }
    return Measured(quantities, {"draws": [dict(run) for run in runs]})


@torch.no_grad()
def relative_errors(
    q: Float[Tensor, "1 1 n d"],
    k: Float[Tensor, "1 1 n d"],
    v: Float[Tensor, "1 1 n d"],
    choices: Sequence[tuple[int, int]],
    seed: int,
) -> list[float]:
    """For each number of keys in a block and of samples the relative error of a head."""
    head_dim = q.shape[-1]
    weights = attention_map(q, k)[0, 0]
    exact, size = weights @ v[0, 0], spectral_norm(weights) * spectral_norm(v[0, 0])
    found = []
    for block, count in choices:
        generator = torch.Generator().manual_seed(seed)
        mixer = HyperAttention(head_dim, 1, block=block, num_samples=count, min_exact=1, generator=generator, dtype=torch.float64)
        found.append(spectral_norm(mixer.attend(q, k, v, Masks(), None)[0, 0] - exact) / size)
    return found


def spectral_norm(x: Float[Tensor, "r c"]) -> float:
    """The largest singular value, from the smaller of the two Gram matrices."""
    gram = x.mT @ x if x.shape[0] > x.shape[1] else x @ x.mT
    return float(torch.linalg.eigvalsh(gram)[-1].sqrt())


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent of the power law that least squares finds through the logarithms."""
    a, b = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    a = a - a.mean()
    return float(a @ b / (a @ a))
