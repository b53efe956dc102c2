r"""What an attention map says of itself: entropy and its bound, concentration, head diversity, sink and local focus.

How much of a map a choice of keys keeps. What activations say of their outliers: the largest entry and the kurtosis. And the maps
of all layers in one: rollout.

Maps are $A \in \mathbb{R}^{b \times h \times n \times m}$, rows the weights of one query, not negative. Masks are True at real
tokens; masked queries, masked keys and rows without any weight are left out of every mean. The last query stands at the last key.
"""

from __future__ import annotations

from attnlab.ops.maps.indicators import (
    attention_entropy,
    concentration,
    entropy_lower_bound,
    head_diversity,
    local_focus,
    sink,
)
from attnlab.ops.maps.mass import kept_mass
from attnlab.ops.maps.outliers import inf_norm, kurtosis
from attnlab.ops.maps.rollout import rollout

__all__ = [
    "attention_entropy",
    "concentration",
    "entropy_lower_bound",
    "head_diversity",
    "inf_norm",
    "kept_mass",
    "kurtosis",
    "local_focus",
    "rollout",
    "sink",
]
