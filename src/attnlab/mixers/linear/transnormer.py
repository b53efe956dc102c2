"""TransNormerLLM's gated linear attention: Lightning attention with SiLU features, LRPE, decay and a linear gate."""

from __future__ import annotations

import torch

from attnlab.core.catalog import mixers
from attnlab.mixers.linear.lightning import CAUSAL_STATE, LightningAttention


@mixers.register("transnormer", family="linear", paper="transnormer-lightning", supports=CAUSAL_STATE)
class TransNormer(LightningAttention):
    r"""Gated linear attention of TransNormerLLM (Qin et al. 2024, Various Lengths Constant Speed, section 3).

    $$o_i = \sum_{j \le i} \lambda^{i-j} (\hat q_i^\top \hat k_j)\, v_j, \qquad
      y = W_o\left(u \odot \mathrm{SRMSNorm}(\mathrm{concat}_h\, o)\right)$$

    with $[q, k, v, u] = x W$, features $\hat q, \hat k = \mathrm{LRPE}(\mathrm{SiLU}(\cdot))$, a gate u without activation,
    and the decay $\lambda_h = \exp(-s_h(1 - l/(L-1) + 10^{-5}))$ of layer l of L. Cost and state: see `LightningAttention`.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always True.
        lrpe: the authors use it in the first layer alone; by default where ``layer`` is 0.
        layer: l, from 0.
        num_layers: L; 1 leaves the slopes as they are.
        decay: "alibi" or "none".
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an unknown decay, or a layer outside the model.

    Differs from the paper: padding zeroes keys instead of values, which is the same sum.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = True,
        lrpe: bool | None = None,
        layer: int = 0,
        num_layers: int = 1,
        decay: str = "alibi",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            causal=causal,
            activation="silu",
            gate=True,
            lrpe=layer == 0 if lrpe is None else lrpe,
            decay=decay,
            layer=layer,
            num_layers=num_layers,
            device=device,
            dtype=dtype,
        )
