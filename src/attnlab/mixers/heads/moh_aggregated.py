"""Mixture-of-head attention on aggregated attention: the lower stages of the authors' vision models."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.mixers.heads.routed_heads import RoutedHeads
from attnlab.mixers.parts.foveal import FOVEAL, FovealAttention, FovealOptions


@mixers.register(
    "moh_aggregated",
    family="heads",
    paper="moh",
    supports=replace(FOVEAL, discontinuous=True),
    example={"num_shared": 1, "num_active": 2, "pool": 3},
)
class MixtureOfAggregatedHeads(RoutedHeads, FovealAttention):
    r"""Aggregated attention whose head outputs are weighed per token by a router (Jin et al. 2024, MoH-ViT).

    $$y_t = \sum_h g_h(x_t)\, o_{h,t} W_O^h$$

    with the gates $g$ of `MixtureOfHeads` on the heads $o$ of `AggregatedAttention`, its positional weights included. The first
    stages of MoH-ViT, whose last stage is `moh` with the score "cosine". Time and memory are those of aggregated attention.
    ``record`` collects what both of them emit.

    Args:
        dim: width of the tokens.
        num_heads: all heads.
        num_shared: heads that are always on, the first ones; by default a quarter, with "query_norm" half.
        num_active: routed heads a token uses; by default half of the routed ones, 0 if all heads are shared.
        router: "linear", or "query_norm" (parameter-free, binary).
        **options: those of `AggregatedAttention`.

    Raises:
        UnsupportedError: with ``causal=True``; without a grid of rank 2.
        ValueError: for counts that do not fit, an unknown router, or what `AggregatedAttention` refuses.

    Differs from the paper: the balance loss counts real tokens alone.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_shared: int | None = None,
        num_active: int | None = None,
        router: str = "linear",
        **options: Unpack[FovealOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.add_router(router, num_shared, num_active, device=options.get("device"), dtype=options.get("dtype"))
