"""Linear attention: any feature map, any normaliser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.linear.core import LINEAR, LinearMixer
from attnlab.mixers.linear.normalizers import Clamp, Divide, Magnitude, Normalizer, Subtract
from attnlab.mixers.parts.features import FEATURE_MAPS
from attnlab.mixers.parts.random_features import RANDOM_MAPS, RandomFeatures
from attnlab.positions import create_position

_MAY_VANISH = {"relu", "squared_relu", "leaky_relu", "identity", "trigonometric"}  # maps whose products may sum to 0


@mixers.register("linear", family="linear", supports=LINEAR)
class LinearAttention(LinearMixer):
    r"""Linear attention (Katharopoulos et al. 2020, equations 5 and 9), feature map $\phi(x) = \mathrm{elu}(x) + 1$ by default.

    $$o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}$$

    over all j, or over j <= i where causal. Time O(n w d), memory O(n (w + d)) for features of width w: chunks, no n x n map.
    State: ``sum`` (b, h, w, d + 1), the outer products with a column of ones for the denominator; "subtract" and "magnitude" add
    a row for the values' sum. With the random features of Choromanski et al. 2020 it is Performer's FAVOR+.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        feature_map: "elu", "relu", "squared_relu", "softplus", "sigmoid", "exp", "softmax" (over the channels), "leaky_relu",
            "identity", or random features of the softmax kernel: "positive" or "trigonometric".
        num_features: random directions, orthogonal in blocks, by default for features as wide as the head: head_dim of them,
            or half as many for "trigonometric". They are the buffer ``random.directions``, see `redraw`.
        normalizer: "divide"; "clamp" (the denominator is at least ``denominator_min``); "subtract" (of `inline`) and "magnitude"
            (of `mala`), both with scale head_dim ** -0.5, and over the keys so far where causal; or "none".
        denominator_min: of "clamp".
        rotary: turn the features of the numerator by their place (Su et al. 2021, RoFormer, equation 19), not those of the
            denominator, which could vanish; self-attention alone.
        generator: draws the directions.
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all and ``position`` "none".

    Raises:
        ValueError: for an unknown feature map or normaliser, fewer than one direction, grouped keys, a position, or ``rotary``
            with random features.

    Differs from the paper: queries whose denominator is 0 (no key, or "relu" with nothing in common) give exactly 0. Positive
    features are not shifted by their maximum, which a stream does not know: in float32 they do not overflow below head_dim = 128
    or so, and keys that point in no direction's way vanish; trigonometric ones overflow for long keys. "leaky_relu", "identity"
    and "trigonometric" give weights of both signs, whose sum may come near 0: "divide" and "magnitude" want positive features.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        feature_map: str = "elu",
        num_features: int | None = None,
        normalizer: str = "divide",
        denominator_min: float | int = 1.0,
        rotary: bool = False,
        generator: torch.Generator | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if feature_map not in (*FEATURE_MAPS, *RANDOM_MAPS):
            raise ValueError(f"feature_map: expected one of {sorted((*FEATURE_MAPS, *RANDOM_MAPS))}, got {feature_map!r}")
        if self.position_name != "none":
            raise ValueError(
                f"position: expected 'none' (a rotation can make the denominator vanish), got {self.position_name!r}; "
                "rotary=True turns the numerator alone"
            )
        self.feature_map, self.normalizer = feature_map, self._normalizer(normalizer, float(denominator_min))
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.random: RandomFeatures | None = None
        if feature_map in RANDOM_MAPS:
            usual = self.head_dim if feature_map == "positive" else max(1, self.head_dim // 2)
            count, scale = usual if num_features is None else num_features, self.head_dim**-0.5
            self.random = RandomFeatures(feature_map, self.head_dim, count, scale=scale, generator=generator, **place)
        if rotary and self.random is not None:
            raise ValueError(f"rotary: expected False with feature_map={feature_map!r}, got True")
        self.turns = rotary
        self.rotary = create_position("rotary" if rotary else "none", num_heads, self.head_dim).to(**place)
        # A denominator that comes down to 0 makes the output jump.
        self.promise(discontinuous=normalizer == "divide" and feature_map in _MAY_VANISH)

    @property
    def feature_width(self) -> int:
        """That of a head, or of the random features."""
        return self.head_dim if self.random is None else self.random.width

    def features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n w"]:
        """The feature map."""
        return FEATURE_MAPS[self.feature_map](x) if self.random is None else self.random(x)

    def turn(self, x: Float[Tensor, "b h n w"], index: Int[Tensor, "#b n"] | None, grid: Grid | None) -> Float[Tensor, "b h n w"]:
        """Features turned by their place in the sequence."""
        return x if index is None else self.rotary.encode(x, index)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Replace random directions by new ones; nothing where the features have none."""
        if self.random is not None:
            self.random.redraw(generator)

    def _normalizer(self, name: str, minimum: float) -> Normalizer:
        scale = self.head_dim**-0.5
        kinds: dict[str, Callable[[], Normalizer]] = {
            "divide": Divide,
            "clamp": lambda: Clamp(minimum),
            "subtract": lambda: Subtract(scale),
            "magnitude": lambda: Magnitude(scale),
            "none": Normalizer,
        }
        if name not in kinds:
            raise ValueError(f"normalizer: expected one of {sorted(kinds)}, got {name!r}")
        return kinds[name]()
