"""Search spaces by name."""

from __future__ import annotations

from typing import Any

from attnlab.core.registry import Registry
from attnlab.models.search_space import SearchSpace

search_spaces: Registry[SearchSpace] = Registry("search_space", "attnlab.models")


def create_search_space(name: str, **options: Any) -> SearchSpace:
    """A registered space, with other choices where ``options`` give them.

    Raises:
        UnknownNameError: for an unknown name or option; the nearest ones are named.
        ValueError: for choices that are none.
    """
    return search_spaces.create(name, **options)


@search_spaces.register("efficient_transformers", paper="nas-efficient-transformers", partial=True)
def efficient_transformers(
    *, mixers: tuple[str, ...] = ("softmax", "linear"), hidden: tuple[int, ...] = (1024, 2048, 3072)
) -> SearchSpace:
    """Softmax or linear attention in each layer, 4 or 8 heads, one to six layers (Liu et al. 2022).

    RECONSTRUCTION: from the paper's abstract and the sizes of its card. The paper's linear attention is cosFormer; until that is
    here, "linear" stands in.

    Args:
        mixers: of which each layer has one.
        hidden: inner widths of a layer's channel mixer.

    Raises:
        ValueError: if there is nothing to choose from, a choice twice, or a width that is not positive.
    """
    return SearchSpace(mixers=mixers, dims=(512, 640), depths=(1, 2, 3, 4, 5, 6), num_heads=(4, 8), hidden=hidden)
