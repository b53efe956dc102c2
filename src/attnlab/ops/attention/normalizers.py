"""How logits become weights: over a row of keys (softmax and its kin), or element by element."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.errors import UnknownNameError, nearest

NORMALIZERS: dict[str, type[Normalizer]] = {}
"""The normalisers by name."""


class Normalizer:
    """A map from logits (..., keys) to weights of the same shape.

    A subclass gives the formula (`weights`), and the same with its derivative for the blockwise form, where both may overwrite
    what they get.

    Args:
        numbers: the normaliser's own constants.
    """

    name: ClassVar[str]
    elementwise: ClassVar[bool] = False
    """Whether each weight depends on its own logit alone."""

    def __init__(self, *numbers: float | int) -> None:
        self.numbers = tuple(float(x) for x in numbers)

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            NORMALIZERS[cls.name] = cls

    def weights(self, logits: Tensor) -> Tensor:
        """The formula."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement weights")

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weights, and what `backward` wants to have; ``logits`` may be overwritten."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement forward")

    def backward(self, kept: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the logits from that of the weights, which may be overwritten."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement backward")


class Softmax(Normalizer):
    r"""$w_j = e^{s_j} / \sum_l e^{s_l}$."""

    name = "softmax"

    def __init__(self) -> None:
        super().__init__()

    def weights(self, logits: Tensor) -> Tensor:
        """Rows sum to one."""
        return torch.softmax(logits, dim=-1)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """In place."""
        torch.ops.aten._softmax.out(logits, -1, False, out=logits)
        return logits, logits

    def backward(self, kept: Tensor, grad: Tensor) -> Tensor:
        r"""$w_j (g_j - \sum_l w_l g_l)$, in place."""
        torch.ops.aten._softmax_backward_data.out(grad, kept, -1, grad.dtype, grad_input=grad)
        return grad


class SoftmaxPlusOne(Softmax):
    r"""$w_j = e^{s_j} / (1 + \sum_l e^{s_l})$: softmax with one more key, of logit 0 and value 0."""

    name = "softmax_plus_one"

    def weights(self, logits: Tensor) -> Tensor:
        """Rows sum to less than one; a row whose logits all are low gives nothing."""
        total = torch.logsumexp(logits, dim=-1, keepdim=True)
        return (logits - torch.logaddexp(total, torch.zeros_like(total))).exp()

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """In place; the derivative has softmax's form."""
        total = torch.logsumexp(logits, dim=-1, keepdim=True)
        weights = logits.sub_(torch.logaddexp(total, torch.zeros_like(total))).exp_()
        return weights, weights


class ClippedSoftmax(Softmax):
    r"""$w_j = \mathrm{clip}((\zeta - \gamma)\,\mathrm{softmax}_j(s) + \gamma,\; 0,\; 1)$ (Bondarenko et al. 2023, equation 4).

    Args:
        gamma: at most 0; below it finite logits reach a weight of exactly 0.
        zeta: at least 1; above it they reach exactly 1.

    Raises:
        ValueError: for a gamma above 0 or a zeta below 1.
    """

    name = "clipped_softmax"

    def __init__(self, gamma: float | int = -0.03, zeta: float | int = 1.0) -> None:
        Normalizer.__init__(self, gamma, zeta)
        if gamma > 0.0:
            raise ValueError(f"gamma: expected at most 0, got {gamma}")
        if zeta < 1.0:
            raise ValueError(f"zeta: expected at least 1, got {zeta}")
        self.gamma, self.zeta = gamma, zeta

    def _stretched(self, soft: Tensor) -> Tensor:
        return soft * (self.zeta - self.gamma) + self.gamma

    def weights(self, logits: Tensor) -> Tensor:
        """Clipped entries have no gradient."""
        return self._stretched(super().weights(logits)).clamp(0.0, 1.0)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The plain softmax is kept: its derivative is needed at clipped entries too."""
        soft, _ = super().forward(logits)
        return self._stretched(soft).clamp_(0.0, 1.0), soft

    def backward(self, kept: Tensor, grad: Tensor) -> Tensor:
        """Softmax's, behind the clip's; in place."""
        stretched = self._stretched(kept)
        grad.masked_fill_((stretched < 0.0).logical_or_(stretched > 1.0), 0.0).mul_(self.zeta - self.gamma)
        return super().backward(kept, grad)


class TopKSoftmax(Softmax):
    """Softmax over the k largest logits of each row, 0 elsewhere.

    Args:
        k: how many keys a query keeps, at least 1; rows with fewer keep all.

    Raises:
        ValueError: for a k below 1.
    """

    name = "top_k_softmax"

    def __init__(self, k: float | int = 8) -> None:
        Normalizer.__init__(self, k)
        if k < 1 or k != int(k):
            raise ValueError(f"k: expected a positive integer, got {k}")
        self.k = int(k)

    def _kept(self, logits: Tensor) -> Tensor:
        if self.k >= logits.shape[-1]:
            return logits
        chosen = logits.detach().topk(self.k, dim=-1, sorted=False).indices
        dropped = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, chosen, False)
        return logits.masked_fill(dropped, float("-inf"))

    def weights(self, logits: Tensor) -> Tensor:
        """Of equal logits at the border some are kept, so that exactly k are."""
        return super().weights(self._kept(logits))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax of what is kept."""
        return super().forward(self._kept(logits))


class Elementwise(Normalizer):
    """A normaliser without constants whose weights each depend on their own logit alone."""

    elementwise = True

    def __init__(self) -> None:
        super().__init__()


class Sigmoid(Elementwise):
    r"""$w_j = \sigma(s_j)$."""

    name = "sigmoid"

    def weights(self, logits: Tensor) -> Tensor:
        """Keys do not compete."""
        return torch.sigmoid(logits)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """In place."""
        return logits.sigmoid_(), logits

    def backward(self, kept: Tensor, grad: Tensor) -> Tensor:
        """In place."""
        torch.ops.aten.sigmoid_backward.grad_input(grad, kept, grad_input=grad)
        return grad


class Tanh(Elementwise):
    r"""$w_j = \tanh(s_j)$."""

    name = "tanh"

    def weights(self, logits: Tensor) -> Tensor:
        """Of both signs."""
        return torch.tanh(logits)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        r"""In place, as $1 / (1 + 2/u)$ with $u = e^{2s} - 1$: exact near 0 too, and faster than torch's own."""
        weights = logits.mul_(2.0).clamp_(max=40.0).expm1_().reciprocal_().mul_(2.0).add_(1.0).reciprocal_()
        return weights, weights

    def backward(self, kept: Tensor, grad: Tensor) -> Tensor:
        """In place."""
        torch.ops.aten.tanh_backward.grad_input(grad, kept, grad_input=grad)
        return grad


class Relu(Elementwise):
    r"""$w_j = \max(s_j, 0)$."""

    name = "relu"

    def weights(self, logits: Tensor) -> Tensor:
        """Sparse, unbounded."""
        return torch.relu(logits)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """In place."""
        return logits.relu_(), logits

    def backward(self, kept: Tensor, grad: Tensor) -> Tensor:
        """In place."""
        torch.ops.aten.threshold_backward.grad_input(grad, kept, 0.0, grad_input=grad)
        return grad


class TaylorExp(Elementwise):
    r"""$w_j = 1 + s_j + s_j^2 / 2$: the exponential to second order, at least 1/2."""

    name = "taylor_exp"

    def weights(self, logits: Tensor) -> Tensor:
        """Near the exponential where logits are small."""
        return 1.0 + logits + 0.5 * logits.square()

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The logits are kept."""
        return logits.mul(0.5).add_(1.0).mul_(logits).add_(1.0), logits

    def backward(self, kept: Tensor, grad: Tensor) -> Tensor:
        """In place."""
        return grad.mul_(kept + 1.0)


class Identity(Elementwise):
    """The logits themselves."""

    name = "identity"

    def weights(self, logits: Tensor) -> Tensor:
        """As they are."""
        return logits

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As they are."""
        return logits, logits

    def backward(self, kept: Tensor, grad: Tensor) -> Tensor:
        """As it is."""
        return grad


def create_normalizer(name: str, *numbers: float | int) -> Normalizer:
    """The normaliser called ``name`` with its constants; UnknownNameError names the nearest."""
    if name not in NORMALIZERS:
        raise UnknownNameError(f"normalizer: expected one of {sorted(NORMALIZERS)}, got {name!r}{nearest(name, NORMALIZERS)}")
    return NORMALIZERS[name](*numbers)


def masked_weights(
    logits: Float[Tensor, "b h n m"], allowed: Bool[Tensor, "#b #h #n #m"] | None, normalizer: Normalizer
) -> Float[Tensor, "b h n m"]:
    """Weights with exact zeros at pairs that are not allowed; a row without any is 0 and has a zero gradient."""
    if allowed is None:
        return normalizer.weights(logits)
    if normalizer.elementwise:
        return normalizer.weights(logits.masked_fill(~allowed, 0.0)).masked_fill(~allowed, 0.0)
    # A row that allows nothing is normalised as if it allowed everything, then zeroed: no NaN arises that could spread.
    usable = allowed | ~allowed.any(dim=-1, keepdim=True)
    return normalizer.weights(logits.masked_fill(~usable, float("-inf"))).masked_fill(~allowed, 0.0)
