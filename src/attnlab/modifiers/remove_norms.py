"""Take the norms out of a model."""

from __future__ import annotations

import fnmatch

from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.masks import zero_masked
from attnlab.modifiers.registry import modifiers


class NoNorm(nn.Module):
    """Stands where a norm stood: tokens (batch, n, dim) pass unchanged, but for zeros at masked ones where a mask is given."""

    def forward(self, x: Float[Tensor, "..."], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "..."]:
        """``x``."""
        return x if mask is None else zero_masked(x, mask)


@modifiers.register("remove_norms", family="normalisation")
def remove_norms(
    module: nn.Module, *, kinds: tuple[str, ...] = ("LayerNorm", "RMSNorm"), keep: tuple[str, ...] = ()
) -> nn.Module:
    r"""Every layer norm exchanged for the identity $y = x$ (Zhai et al. 2023: with SigmaReparam no norm is needed).

    Args:
        module: any module; all norms in it go.
        kinds: how the names of the classes end that count as norms; those of PyTorch, of attnlab and of most model libraries do.
        keep: shell patterns of the paths of norms that stay (``"*.q_norm"``).

    Returns:
        ``module``, or a stand-in where ``module`` is a norm itself.

    Differs from the paper: nothing. A mechanism that has a norm in its definition (of queries and keys, say) loses it too,
    unless ``keep`` names it.
    """

    def goes(path: str, part: nn.Module) -> bool:
        kept = any(fnmatch.fnmatchcase(path, pattern) for pattern in keep)
        return type(part).__name__.endswith(kinds) and not kept

    if goes("", module):
        return NoNorm()
    for path, parent in list(module.named_modules()):
        for name, part in list(parent.named_children()):
            if goes(f"{path}.{name}" if path else name, part):
                setattr(parent, name, NoNorm())
    return module
