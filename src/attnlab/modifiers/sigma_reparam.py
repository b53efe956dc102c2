"""SigmaReparam: every weight matrix divided by its spectral norm and multiplied by a learned number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attnlab.modifiers.registry import modifiers

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers whose weight is a matrix of outputs by inputs."""

_TINY = 1e-12


class SigmaReparam(nn.Module):
    r"""The parametrisation $\hat W = (\gamma / \sigma(W))\, W$ of one weight, to be used through `sigma_reparam`.

    With a stored unit vector u in the space of the inputs, $v = \overline{W u}$, $u' = \overline{W^\top v}$ and
    $\sigma = v^\top W u'$, where a bar divides by the length (at least 1e-12). v and u' are constants for autograd. In training
    mode u' and $\sigma$ are stored at every reading of the weight, in evaluation they are computed and dropped.

    Args:
        weight: the raw weight (out, ...); what follows the outputs is one axis of inputs.
        gamma: the learned factor at the start; None for $\sigma$ of ``weight``.
        stats_only: leave the weight as it is, and only keep track of $\sigma$.
    """

    u: Float[Tensor, " i"]
    sigma: Float[Tensor, ""]

    def __init__(self, weight: Float[Tensor, "o ..."], *, gamma: float | None = None, stats_only: bool = False) -> None:
        super().__init__()
        with torch.no_grad():
            matrix = weight.flatten(1).to(_wide(weight.dtype))
            _, lengths, right = torch.linalg.svd(matrix, full_matrices=False)
        self.register_buffer("u", right[0].to(weight.dtype, copy=True))
        self.register_buffer("sigma", lengths[0].to(weight.dtype, copy=True))
        self.gamma = None
        if not stats_only:
            self.gamma = nn.Parameter(self.sigma.clone() if gamma is None else torch.full_like(self.sigma, gamma))

    @property
    def effective_norm(self) -> Float[Tensor, ""]:
        """The spectral norm of the weight that the layer uses, as far as the last estimate goes."""
        return self.sigma if self.gamma is None else self.gamma

    def forward(self, weight: Float[Tensor, "o ..."]) -> Float[Tensor, "o ..."]:
        """The weight that the layer uses; sigma in float32 at least, under autocast too."""
        device = "cpu" if weight.is_meta else weight.device.type
        with torch.autocast(device, enabled=False):
            matrix = weight.flatten(1).to(_wide(weight.dtype))
            with torch.no_grad():
                v = F.normalize(matrix @ self.u.to(matrix.dtype), dim=0, eps=_TINY)
                u = F.normalize(v @ matrix, dim=0, eps=_TINY)
            sigma = v @ (matrix @ u)
            if self.training:
                with torch.no_grad():
                    self.u.copy_(u)
                    self.sigma.copy_(sigma)
            return weight if self.gamma is None else (self.gamma.to(matrix.dtype) / sigma).to(weight.dtype) * weight


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@modifiers.register("sigma_reparam", family="normalisation", paper="sigma-reparam")
def sigma_reparam(module: nn.Module, *, init: str = "keep", init_std: float = 0.02, stats_only: bool = False) -> nn.Module:
    r"""SigmaReparam of every linear and convolutional layer (Zhai et al. 2023): $\hat W = (\gamma / \sigma(W))\, W$.

    $\sigma(W)$ is the spectral norm of the weight as a matrix of outputs by inputs, $\gamma$ one learned number a layer. It
    bounds how fast logits grow, and so keeps the entropy of attention (`attnlab.ops.maps.attention_entropy`) from collapsing.
    $\sigma$ is estimated by one power iteration at every forward pass in training mode, from a vector that starts as the first
    right singular vector: two products of matrix and vector. Biases are left alone.

    The weight of a layer becomes ``parametrizations.weight.original``, beside it ``parametrizations.weight.0`` holds
    ``gamma`` (learned), ``u`` and ``sigma`` (buffers, saved: evaluation depends on u).
    `torch.nn.utils.parametrize.remove_parametrizations` folds it into a plain weight.

    Args:
        module: any module; it and everything in it is searched for layers (`torch.nn.Linear`, convolutions of 1 to 3 dimensions).
        init: "keep" ($\gamma = \sigma(W)$: nothing changes at the start, also for trained weights) or "paper" (weights drawn
            anew from a truncated normal of standard deviation ``init_std``, $\gamma = 1$).
        init_std: of the weights that "paper" draws.
        stats_only: keep track of $\sigma$ without using it; no $\gamma$.

    Raises:
        ValueError: for an unknown ``init``, a standard deviation that is not positive, a module without such layers, or one
            whose weights are parametrised so already.

    Differs from the paper: nothing in the formula. Whoever reads a layer's weight twice in a training step makes two power
    iterations. Transposed convolutions, whose weight has the inputs first, are left alone.
    """
    if init not in ("keep", "paper"):
        raise ValueError(f"init: expected 'keep' or 'paper', got {init!r}")
    if init_std <= 0:
        raise ValueError(f"init_std: expected a positive number, got {init_std}")
    layers = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
    if not layers:
        raise ValueError(f"module: expected a linear or convolutional layer in it, got {type(module).__name__} without any")
    if any(isinstance(part, SigmaReparam) for part in module.modules()):
        raise ValueError("module: expected plain weights, got some with sigma_reparam already")
    for layer in layers:
        if init == "paper":
            nn.init.trunc_normal_(layer.weight, std=init_std)
        part = SigmaReparam(layer.weight, gamma=1.0 if init == "paper" else None, stats_only=stats_only)
        part.train(layer.training)
        parametrize.register_parametrization(layer, "weight", part, unsafe=True)  # its check would make a power iteration
    return module
