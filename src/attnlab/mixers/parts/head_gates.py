"""A sigmoid gate on each head's output: by token, by example, or one number a head."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.masks import zero_masked
from attnlab.mixers.parts.slot_linear import SlotLinear

GATES = ("none", "linear", "mlp", "mlp2", "all_features")
SCOPES = ("token", "head", "unconditional")


class HeadGate(nn.Module):
    r"""$g = \sigma(G(x))$ a head (Bondarenko et al. 2023).

    G reads a head's slice $x_h$ of the layer's input, of width $d = \mathrm{dim}/h$: one linear map ("linear"), or one hidden
    layer with ReLU of d/4 ("mlp") or d ("mlp2") units; or all of x ("all_features"). With scope "head" the logits are averaged
    over the real tokens of an example before the sigmoid; with "unconditional" they are one learned number a head.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        kind: one of `GATES` but "none".
        scope: one of `SCOPES`.
        init: the gates at first, apart from what the weights add: the last bias is its logit.
        pretrained: the weights begin near 0 (deviation 0.01), so that all gates begin at ``init``.

    Raises:
        ValueError: for an unknown kind or scope, or an ``init`` that is not between 0 and 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kind: str = "linear",
        scope: str = "token",
        init: float = 0.25,
        pretrained: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in GATES[1:]:
            raise ValueError(f"gate: expected one of {GATES}, got {kind!r}")
        if scope not in SCOPES:
            raise ValueError(f"gate_scope: expected one of {SCOPES}, got {scope!r}")
        if not 0.0 < init < 1.0:
            raise ValueError(f"gate_init: expected a number between 0 and 1, got {init}")
        self.num_heads, self.kind, self.scope = num_heads, kind, scope
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim // num_heads
        hidden = {"mlp": max(1, width // 4), "mlp2": width}.get(kind)
        self.hidden: nn.Module | None = None
        self.out: nn.Module | None = None
        self.bias = nn.Parameter(torch.full((num_heads,), math.log(init / (1.0 - init)), **place))
        if scope == "unconditional":
            return
        if kind == "all_features":
            self.out = nn.Linear(dim, num_heads, bias=False, **place)
        else:
            self.hidden = None if hidden is None else SlotLinear(num_heads, width, hidden, bias=True, **place)
            self.out = SlotLinear(num_heads, width if hidden is None else hidden, 1, **place)
        if pretrained:
            for name, parameter in self.named_parameters():
                if name.endswith("weight"):
                    nn.init.normal_(parameter, std=0.01)

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "#b #n h"]:
        """The gates: of every token, or one row for all tokens of an example, or of all examples."""
        if self.out is None:
            return self.bias.sigmoid().view(1, 1, -1)
        if self.kind == "all_features":
            logits = self.out(x)
        else:
            pieces = x.unflatten(-1, (self.num_heads, -1)).flatten(0, 1)
            if self.hidden is not None:
                pieces = self.hidden(pieces).relu()
            logits = self.out(pieces).view(*x.shape[:2], self.num_heads)
        if self.scope == "head":
            real = x.shape[1] if mask is None else mask.sum(dim=1)[:, None, None].clamp(min=1)
            logits = zero_masked(logits, mask).sum(dim=1, keepdim=True) / real
        return (logits + self.bias).sigmoid()
