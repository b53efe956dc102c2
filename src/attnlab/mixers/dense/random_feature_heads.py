"""Random-feature attention of the learning theory: frozen random query-key maps, trained values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.attention import DENSE
from attnlab.mixers.parts.counts import key_counts
from attnlab.mixers.parts.ridge import ridge_fit
from attnlab.ops.attention import attention


@mixers.register("random_feature_heads", family="dense", paper="random-feature-attention-theory", supports=DENSE)
class RandomFeatureHeads(StreamingMixer):
    r"""Attention that is linear in what it learns (after Fu et al. 2023, random features lens). A reconstruction.

    With $\tilde x = [x; 1] \in \mathbb{R}^{c+1}$, frozen random $W_m \in \mathbb{R}^{(c+1) \times (c+1)}$, M of them, and trained
    $V_m \in \mathbb{R}^{c \times (c+1)}$, over the $N_i$ keys that query i may use,

    $$y_i = \frac{1}{M} \sum_{m=1}^{M} V_m \phi_{m,i}, \qquad
      \phi_{m,i} = \frac{1}{N_i} \sum_j \max(\tilde x_i^\top W_m \tilde x_j, 0)\, \tilde x_j .$$

    Entries of $W_m$ have variance 1/4 and mean 0, or as mean the identity on x, 0 for the added 1 ("biased" random features).
    The abstract names frozen maps, trained values and a mean that is not 0; variance and normalisation are from memory of the
    paper, so no equivalence with it is claimed. Time O(n m c M), memory O(n c M). The state holds all tokens.

    The paper's setting, one query $x_0$ over keys $x_1 \dots x_N$, is ``mixer(x0, keys)``. `features` are what the output is
    linear in, and `fit` sets V to their ridge regression.

    Args:
        dim: c.
        num_heads: a divisor of c, as for every mixer.
        causal: a query uses the keys up to itself, and divides by their number.
        num_features: M, any number; None for ``num_heads``. It is what the attribute ``num_heads`` says, and the heads of
            the mixing matrix and of a ``pair_mask``.
        mean: of W: "zero" or "identity".
        generator: source of W, a buffer (``random_maps``) that is saved.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an unknown mean, or less than one feature.

    Differs from the paper: an output for each query, as wide as the tokens.
    """

    random_maps: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        num_features: int | None = None,
        mean: str = "zero",
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        num_features = num_heads if num_features is None else num_features
        if num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {num_features}")
        if mean not in ("zero", "identity"):
            raise ValueError(f"mean: expected 'zero' or 'identity', got {mean!r}")
        self.num_heads, self.mean = num_features, mean
        source = "cpu" if generator is None else generator.device
        maps = 0.5 * torch.randn(num_features, dim + 1, dim + 1, generator=generator, device=source)
        if mean == "identity":
            maps[:, :dim, :dim] += torch.eye(dim, device=source)
        self.register_buffer("random_maps", maps.to(device=device, dtype=dtype))
        self.out_proj = nn.Linear(num_features * (dim + 1), dim, bias=False, device=device, dtype=dtype)

    def features(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m c"] | None = None, masks: Masks | None = None
    ) -> Float[Tensor, "b n f"]:
        r"""$\phi / M$, all features in a row (b, n, M (c + 1)); tokens are zero at masked ones."""
        q, keys = self._project(x, context)
        heads = self._attend(q, keys, keys, masks or Masks())
        return heads.transpose(1, 2).flatten(2) / self.num_heads

    @torch.no_grad()
    def fit(
        self,
        x: Float[Tensor, "b n c"],
        targets: Float[Tensor, "b n c"],
        strength: float | int,
        *,
        context: Float[Tensor, "b m c"] | None = None,
    ) -> None:
        """Set V to the ridge regression of ``targets`` over all tokens of all examples.

        Raises:
            ValueError: for a strength that is not positive, or targets of another shape than ``x``.
        """
        if targets.shape != x.shape:
            raise ValueError(f"targets: expected shape {tuple(x.shape)} as x, got {tuple(targets.shape)}")
        rows = self.features(x, context).flatten(0, 1)
        self.out_proj.weight.copy_(ridge_fit(rows, targets.flatten(0, 1), strength).T)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No tokens yet."""
        tokens = torch.zeros(batch_size, 0, self.dim, device=device, dtype=dtype)
        return State({"x": tokens, "real": torch.ones(batch_size, 0, device=device, dtype=torch.bool)})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Over the tokens so far and the new ones."""
        real = state["real"].new_ones(x.shape[:2]) if mask is None else mask
        # the mask is copied: it may be saved for a gradient, and growing would write beside it in place
        after = state.grow(1, x=x).replace(real=torch.cat((state["real"], real), dim=1))
        return self.out_proj(self.features(x, after["x"], Masks(mask, after["real"]))), after

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """The features times the values."""
        q, keys = self._project(x, context)
        heads = self._attend(q, keys, keys, masks)
        self.emit("values", lambda: keys.expand(-1, self.num_heads, -1, -1))
        self.emit("mixed", heads)
        self.emit("attention", lambda: self._map(q, keys, masks))
        return self.out_proj(heads.transpose(1, 2).flatten(2) / self.num_heads)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """Rectified scores over the number of keys."""
        return self._map(*self._project(x, context), masks)

    def _project(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m c"] | None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b 1 m d"]]:
        """Queries through the random maps, and the tokens with their 1 as the keys and values of all heads."""
        q = torch.einsum("bni,hij->bhnj", F.pad(x, (0, 1), value=1.0), self.random_maps.to(x.dtype))
        return q, F.pad(x if context is None else context, (0, 1), value=1.0).unsqueeze(1)

    def _attend(
        self, q: Float[Tensor, "b h n d"], keys: Float[Tensor, "b 1 m d"], values: Float[Tensor, "b 1 m e"], masks: Masks
    ) -> Float[Tensor, "b h n e"]:
        counts = key_counts(q, keys.shape[2], causal=self.causal, key_mask=masks.key, pair_mask=masks.pair)
        heads = attention(
            q,
            keys.to(q.dtype),
            values.to(q.dtype),
            scale=1.0,
            causal=self.causal,
            key_mask=masks.key,
            pair_mask=masks.pair,
            normalizer="relu",
        )
        return heads / counts

    def _map(self, q: Float[Tensor, "b h n d"], keys: Float[Tensor, "b 1 m d"], masks: Masks) -> Float[Tensor, "b h n m"]:
        places = torch.eye(keys.shape[2], device=q.device, dtype=q.dtype)
        return self._attend(q, keys, places.expand(len(q), 1, -1, -1), masks)
