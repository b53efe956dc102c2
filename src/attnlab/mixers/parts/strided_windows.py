"""Windows of a volume whose cells lie apart: each takes every T'-th frame, not T neighbouring ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def strided_windows(
    x: Float[Tensor, "b c t j e"], window: Sequence[int], *, strided: bool = True
) -> Float[Tensor, "b c wt wje u"]:
    r"""Cut a clip of t frames, j joints and e entities into windows as ISTA-Net does (Wen et al. 2023).

    Each axis is padded at its end to a multiple of the window's side w by repeating its last entry, to $w u$ entries. Window k of
    an axis holds the entries $k, k + u, k + 2u, \dots$; with ``strided=False`` its neighbours $kw, \dots, kw + w - 1$.

    Args:
        x: the volume (b, c, t, j, e).
        window: sides of a window.
        strided: the authors' layout, or contiguous windows.

    Returns:
        (b, c, wt, wj * we, u): cells of a window in raster order, then the windows in raster order over their three axes.

    Raises:
        ValueError: for a window that has not three positive sides.
    """
    if len(window) != 3 or min(window) < 1:
        raise ValueError(f"window: expected three positive sides, got {tuple(window)}")
    extra = [-side % w for side, w in zip(x.shape[2:], window, strict=True)]
    x = F.pad(x, [0, extra[2], 0, extra[1], 0, extra[0]], mode="replicate")
    sides = dict(zip(("wt", "wj", "we"), window, strict=True))
    layout = "(wt ut) (wj uj) (we ue)" if strided else "(ut wt) (uj wj) (ue we)"
    return rearrange(x, f"b c {layout} -> b c wt (wj we) (ut uj ue)", **sides)
