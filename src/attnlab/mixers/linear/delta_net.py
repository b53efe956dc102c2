"""DeltaNet: linear attention whose write corrects what the state already holds under the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.mixers.linear.stepwise import STEPWISE, StepwiseMixer, StepwiseOptions
from attnlab.mixers.parts.decay import StepDecay
from attnlab.mixers.parts.features import elu_plus_one
from attnlab.mixers.parts.norms import l2_normalize, sum_normalize
from attnlab.mixers.parts.steps import Steps


def _identity(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": torch.relu,
    "elu": elu_plus_one,
    "identity": _identity,
}
_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"l2": l2_normalize, "sum": sum_normalize}


@mixers.register("delta_net", family="linear", paper="deltanet", supports=STEPWISE)
class DeltaNet(StepwiseMixer):
    r"""The delta rule over the sequence (Yang et al. 2024, equations 1 to 10).

    For one head with state $S \in \mathbb{R}^{K \times V}$ and write strength $\beta_t$,

    $$S_t = S_{t-1} + \beta_t k_t (v_t - S_{t-1}^\top k_t)^\top, \qquad o_t = K^{-1/2} S_t^\top q_t$$

    q, k, v are linear maps of x through a short causal convolution and an activation (v: SiLU), q and k normalised over the head;
    $\beta = \sigma(W_b x)$; outputs pass an RMS norm a head, a gate if chosen, and $W_o$. No biases. Time O(n C d + n d^2 / h)
    in chunks of C, memory O(n d). State: ``memory`` (b, h, K, V) in float32 or wider, and the windows of the convolutions.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always True.
        expand_k: K h / dim, width of all keys together relative to dim.
        expand_v: V h / dim.
        conv_size: taps of the short convolutions; 0 for none.
        beta: "sigmoid", or "one" for a write strength of 1.
        negative_eigenvalues: double beta, so that transitions reach -1 along a key.
        gate: multiply the normalised output by SiLU of another linear map of x.
        decay: multiply the state before each step by $e^{-A\Delta_t}$, one number a head with
            $\Delta_t = \mathrm{softplus}(w^\top x_t + b)$ (the gated delta rule, Yang et al. 2024, arXiv 2412.06464).
        qk_activation: "silu", "relu", "elu" (plus 1) or "identity".
        qk_norm: "l2", or "sum" (divide by the sum of the entries).
        norm_eps: of the output norm.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an unknown option value, or widths that the heads do not divide.

    Differs from the paper: a masked token has beta 0 and enters the convolutions as zero, so that padding writes nothing.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        conv_size: int = 4,
        beta: str = "sigmoid",
        negative_eigenvalues: bool = False,
        gate: bool = False,
        decay: bool = False,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        **options: Unpack[StepwiseOptions],
    ) -> None:
        super().__init__(dim, num_heads, conv_size=conv_size, gate=gate, **options)
        for name, value, known in (
            ("qk_activation", qk_activation, list(_ACTIVATIONS)),
            ("qk_norm", qk_norm, list(_NORMS)),
            ("beta", beta, ["sigmoid", "one"]),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.scale_beta = 2.0 if negative_eigenvalues else 1.0
        self.qk_activation, self.qk_norm = qk_activation, qk_norm
        self.b_proj = nn.Linear(dim, num_heads, bias=False, **place) if beta == "sigmoid" else None
        self.decay = StepDecay(dim, num_heads, **place) if decay else None

    def steps(
        self, x: Float[Tensor, "b n c"], q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"]
    ) -> Steps:
        """Keys of length 1, strengths, and a decay if there is one."""
        activate, normalize = _ACTIVATIONS[self.qk_activation], _NORMS[self.qk_norm]
        q, k = normalize(activate(q)), normalize(activate(k))
        beta = torch.ones_like(x[..., : self.num_heads]) if self.b_proj is None else self.b_proj(x).sigmoid()
        beta = (beta * self.scale_beta).transpose(1, 2).unsqueeze(-1)
        decay = None if self.decay is None else self.decay(x)
        return Steps(q, k, F.silu(v), decay, beta, self.key_dim**-0.5)
