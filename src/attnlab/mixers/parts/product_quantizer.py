"""Product quantisation: a vector as one codeword for each of its parts, nearest in the sum of absolute differences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.ops.backends import accumulate_dtype


class ProductQuantizer(nn.Module):
    r"""Codes of vectors whose parts have a codebook each (SPT, Wang et al. 2023).

    $$\mathrm{code}(z)_m = \arg\min_e \lVert z_m - C_{me} \rVert_1, \qquad
      z_m \in \mathbb{R}^{c}, \; C \in \mathbb{R}^{M \times E \times c}$$

    Args:
        width: of the vectors, M c.
        code_width: c.
        num_codes: E.
        device: of the codebook, which begins standard normal.
        dtype: of the codebook.

    Raises:
        ValueError: for sizes below 1, or a width that is no multiple of ``code_width``.
    """

    def __init__(
        self,
        width: int,
        code_width: int,
        num_codes: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if code_width < 1 or width % code_width:
            raise ValueError(f"code_width: expected a divisor of {width}, got {code_width}")
        if num_codes < 1:
            raise ValueError(f"num_codes: expected at least 1, got {num_codes}")
        self.parts, self.code_width, self.num_codes = width // code_width, code_width, num_codes
        self.codebook = nn.Parameter(torch.randn(self.parts, num_codes, code_width, device=device, dtype=dtype))

    def distances(self, z: Float[Tensor, "*s d"]) -> Float[Tensor, "*s m e"]:
        """The L1 distance of each part to its codewords, in float32 or wider."""
        wide = accumulate_dtype(z.dtype)
        flat = z.to(wide).reshape(-1, self.parts, self.code_width).transpose(0, 1)
        found = torch.cdist(flat, self.codebook.to(wide), p=1.0)
        return found.transpose(0, 1).reshape(*z.shape[:-1], self.parts, self.num_codes)

    def codes(self, z: Float[Tensor, "*s d"]) -> Int[Tensor, "*s m"]:
        """The nearest codeword of each part, of equal ones the first."""
        with torch.no_grad():
            return self.distances(z).argmin(-1)

    def words(self, codes: Int[Tensor, "*s m"]) -> Float[Tensor, "*s d"]:
        """The codewords of these codes side by side."""
        part = torch.arange(self.parts, device=codes.device)
        return self.codebook[part, codes].flatten(-2)

    def loss(self, z: Float[Tensor, "b h n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
        r"""$\mathrm{mse}(\tilde z, \hat z) + \mathrm{mse}(z, \hat z)$ over real tokens.

        $\hat z$ are the codewords, $\tilde z$ the mean of all codewords with weights $1 / \max(D, 10^{-5})$ of the distances D.
        Gradients go to the codebook through both terms, and to z.
        """
        distances = self.distances(z)
        near = distances.clamp(min=1e-5).reciprocal()
        soft = torch.einsum("...me,mec->...mc", near / near.sum(-1, keepdim=True), self.codebook.to(near.dtype)).flatten(-2)
        hard = self.words(distances.detach().argmin(-1)).to(near.dtype)
        error = (soft - hard).square() + (z - hard).square()
        if mask is None:
            return error.mean()
        total = error.masked_fill(~mask[:, None, :, None], 0.0).sum()
        return total / (mask.sum().clamp(min=1) * z.shape[1] * z.shape[3])


def one_hot(codes: Int[Tensor, "*s m"], num_codes: int) -> Float[Tensor, "*s me"]:
    """Codes as indicators of all parts side by side: the product of two counts the parts in which they agree, exactly."""
    return F.one_hot(codes, num_codes).flatten(-2).float()


def match_count(first: Int[Tensor, "b h n m"], second: Int[Tensor, "b h k m"], num_codes: int) -> Float[Tensor, "b h n k"]:
    """In how many parts the codes of two vectors agree, for each pair of them."""
    return one_hot(first, num_codes) @ one_hot(second, num_codes).mT
