"""How much of dense attention a choice of keys keeps."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def kept_mass(weights: Float[Tensor, "b h n m"], kept: Bool[Tensor, "#b #h n m"]) -> Float[Tensor, "b h"]:
    r"""The mean over queries of $\sum_{j \in S(i)} A_{ij} / \sum_j A_{ij}$, for dense weights A and chosen keys S(i), (b, h).

    1 where nothing that had weight is left out; the share of the keys that are kept, where all weights of a row are equal.

    Args:
        weights: A, not negative; rows of zeros (masked queries) are not counted.
        kept: True at each pair that is chosen.
    """
    total = weights.sum(-1)
    counted = total > 0
    share = weights.where(kept, 0.0).sum(-1) / total.masked_fill(~counted, 1.0)
    return share.masked_fill(~counted, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)
