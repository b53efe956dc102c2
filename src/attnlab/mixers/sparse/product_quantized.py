"""Product-quantised attention: each query uses the keys whose codes agree best with its own."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.product_quantizer import ProductQuantizer
from attnlab.ops.code_agreement import agreeing_keys
from attnlab.ops.tile_attention import tile_attention

STEPS = 3


@mixers.register(
    "product_quantized",
    family="sparse",
    paper="spt",
    supports=Supports(causal="optional", mixing_matrix=True, discontinuous=True, cost=2.0),
    example={"num_keys": 3, "code_width": 2, "num_codes": 4},
)
class ProductQuantizedAttention(AttentionMixer):
    r"""Softmax attention to the L keys that share most codes with the query (Wang et al. 2023, SPT, arXiv 2312.10365).

    A codebook of M parts, one for all heads and for queries and keys alike (`ProductQuantizer`), gives the codes, and

    $$c_{ij} = \#\{m : \mathrm{code}(q_i)_m = \mathrm{code}(k_j)_m\}, \qquad
      t_{ij} = \min\big(3, \lfloor c_{ij} / \lfloor M / 4 \rfloor \rfloor\big)$$

    Query i keeps the L keys (causal: of those up to i) with the largest $t_{ij}$, of equal ones the first, and
    $o_i = \sum_j \mathrm{softmax}_j(d^{-1/2} q_i^\top k_j)\, v_j$ over them. With L >= n it is softmax attention, on which the
    codebook can be trained first.

    ``record`` collects "selection" (b, h, n, L), the places of each query's keys and -1 for none, and "codebook_loss", a scalar:
    the loss of queries and of keys, of which the authors add 0.01; it is computed only if it is asked for. Time O(n^2 M) for the
    counts, bit by bit (`agreeing_keys`), and O(n L d); memory O(n (d + M E + L)).

    Args:
        dim: width of the tokens.
        num_heads: heads.
        num_keys: L. The authors' is n / 8, here a number of its own, for what a causal model says must not depend on how long
            the text will be.
        code_width: width of a part, a divisor of that of a head; M is their ratio.
        num_codes: codewords of a part.
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for fewer than one key, sizes that do not fit, or a position that is a bias.

    Differs from the paper: logits are not clamped to [-10, 10], which there stands in for subtracting the maximum; ties are
    settled by place, where the authors' kernel settles them by worker; with fewer than L keys none is counted twice.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_keys: int = 64,
        code_width: int = 8,
        num_codes: int = 16,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if num_keys < 1:
            raise ValueError(f"num_keys: expected at least 1, got {num_keys}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; the choice knows no bias")
        self.num_keys = num_keys
        self.quantizer = ProductQuantizer(
            self.head_dim, code_width, num_codes, device=options.get("device"), dtype=options.get("dtype")
        )

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Choose, then softmax over the chosen."""
        keys = self.select(q, k, masks)
        self.emit("selection", keys)
        self.emit("codebook_loss", lambda: self.quantizer.loss(q, masks.query) + self.quantizer.loss(k, masks.key))
        queries = torch.arange(q.shape[2], device=q.device)[None, None, :, None]
        return tile_attention(q, k, v, queries, keys, key_mask=masks.key).output.squeeze(3)

    def select(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk m d"], masks: Masks) -> Int[Tensor, "b h n l"]:
        """The places of the keys of each query, -1 where there are fewer."""
        of_q, of_k = (self.quantizer.codes(x) for x in (q, k))
        of_k = of_k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        return agreeing_keys(
            of_q, of_k, self.quantizer.num_codes, self.num_keys, steps=STEPS, causal=self.causal, key_mask=masks.key
        )
