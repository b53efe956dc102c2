"""Linear attention with a choice of decays: learned, of the token, a head's or a channel's."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.mixers.linear.stepwise import STEPWISE, StepwiseMixer, StepwiseOptions
from attnlab.mixers.parts.decay import ChannelDecay, LearnedDecay, StepDecay
from attnlab.mixers.parts.steps import Steps

DECAYS = ("channel", "step", "learned_head", "learned_channel")
ACTIVATIONS = {"none": nn.Identity(), "silu": nn.SiLU(), "relu": nn.ReLU(), "elu": nn.ELU()}


@mixers.register("gated_linear", family="linear", supports=STEPWISE)
class GatedLinearAttention(StepwiseMixer):
    r"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635, equations 3 and 4), and its relatives by their decays.

    For one head with decays $a_t \in (0, 1]$, a vector over the keys' channels or one number,

    $$S_t = \mathrm{diag}(a_t) S_{t-1} + k_t v_t^\top, \qquad o_t = d^{-1/2} S_t^\top q_t, \qquad
      y = W_o (\mathrm{RMSNorm}(o) \odot \mathrm{SiLU}(W_g x))$$

    ``decay`` says what $a_t$ is: "channel" $\sigma(W_2 W_1 x_t + b)^{1/16}$ (gated linear attention); "step" $e^{-A \Delta_t}$ a
    head, $\Delta_t = \mathrm{softplus}(w^\top x_t + b)$, which weighs the write too, $k_t \Delta_t$ (the state-space dual of
    Mamba-2, Dao and Gu 2024, arXiv 2405.21060); "learned_head" and "learned_channel" a parameter (as in retention). Time
    O(n d^2), memory O(n d). State: ``memory`` (b, h, d, e) in float32 or wider, and the windows of the convolutions.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always True.
        decay: see above.
        expand_k: d h / dim.
        expand_v: e h / dim.
        conv_size: taps of short causal convolutions of q, k and v; 0 for none.
        activation: of q and k: "none", "silu", "relu" or "elu".
        gate: the factor SiLU(W_g x).
        norm_eps: of the output norm.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an unknown option value, or widths that the heads do not divide.

    Differs from the papers: a masked token neither writes nor decays.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        decay: str = "channel",
        conv_size: int = 0,
        activation: str = "none",
        gate: bool = True,
        **options: Unpack[StepwiseOptions],
    ) -> None:
        super().__init__(dim, num_heads, conv_size=conv_size, gate=gate, **options)
        for name, value, known in (("decay", decay, DECAYS), ("activation", activation, tuple(ACTIVATIONS))):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.activation = activation
        self.decay: ChannelDecay | StepDecay | LearnedDecay
        if decay == "channel":
            self.decay = ChannelDecay(dim, num_heads, self.key_dim, **place)
        elif decay == "step":
            self.decay = StepDecay(dim, num_heads, **place)
        else:
            self.decay = LearnedDecay(num_heads, self.key_dim if decay == "learned_channel" else 1, **place)

    def steps(
        self, x: Float[Tensor, "b n c"], q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"]
    ) -> Steps:
        """Decays, and steps as weights of what is written."""
        activate = ACTIVATIONS[self.activation]
        q, k = activate(q), activate(k)
        if isinstance(self.decay, StepDecay):
            k = k * self.decay.steps(x)
        return Steps(q, k, v, self.decay(x), None, self.key_dim**-0.5)
