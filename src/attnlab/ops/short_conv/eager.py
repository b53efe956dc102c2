"""The short convolution without transposes: tokens and channels stay where they are, in both directions.

On a CPU in float32 a (b n c) tensor, seen as an image of one row with channels last, is what oneDNN's depthwise convolution
wants: it takes a third of the time of a loop over taps, and less than a tenth of `conv1d` on a transposed tensor. oneDNN's
gradient of the weight is slow, so that one is summed over the taps in blocks that stay in cache; so is everything in other
dtypes and on other devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attnlab.ops.chunks import full_precision

BLOCK = {"cpu": 2**15}
"""Elements of a block by device: small enough that PyTorch runs it in one thread, from cache; 2**24 elsewhere."""


def convolve(
    padded: Float[Tensor, "b p c"], weight: Float[Tensor, "c w"], bias: Float[Tensor, "c"] | None
) -> Float[Tensor, "b n c"]:
    """See `reference.convolve`. Backward is not differentiable again."""
    if padded.shape[1] == weight.shape[1]:
        y = (padded * weight.mT).sum(1, keepdim=True)
        return y if bias is None else y + bias
    return _forward(padded, weight, bias)


def _sum_of_taps(padded: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
    """The convolution of a sequence with ``padding`` zeros at either end."""
    if padded.device.type == "cpu" and padded.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        image = padded.mT.unsqueeze(2)
        y = F.conv2d(image, weight[:, None, None], bias, padding=(0, padding), groups=len(weight))
        return y.squeeze(2).mT.contiguous()
    padded = F.pad(padded, (0, 0, padding, padding))
    batch, tokens, channels = padded.shape
    taps = weight.mT.contiguous()
    y = padded.new_zeros(batch, tokens - len(taps) + 1, channels)
    if bias is not None:
        y += bias
    for piece in _blocks(y):
        for k, tap in enumerate(taps):
            y[:, piece].addcmul_(padded[:, piece.start + k : piece.stop + k], tap)
    return y


def _blocks(x: Tensor) -> Iterator[slice]:
    """The tokens of (b n c) in blocks."""
    batch, tokens, channels = x.shape
    size = max(1, BLOCK.get(x.device.type, 2**24) // max(1, batch * channels))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


@torch.library.custom_op(
    "attnlab::short_conv_forward", mutates_args=(), schema="(Tensor padded, Tensor weight, Tensor? bias) -> Tensor"
)
@full_precision
def _forward(
    padded: Float[Tensor, "b p c"], weight: Float[Tensor, "c w"], bias: Float[Tensor, "c"] | None
) -> Float[Tensor, "b n c"]:
    return _sum_of_taps(padded, weight, bias)


@torch.library.custom_op(
    "attnlab::short_conv_backward",
    mutates_args=(),
    schema="(Tensor padded, Tensor weight, Tensor dy) -> (Tensor, Tensor, Tensor)",
)
@full_precision
def _backward(
    padded: Float[Tensor, "b p c"], weight: Float[Tensor, "c w"], dy: Float[Tensor, "b n c"]
) -> tuple[Float[Tensor, "b p c"], Float[Tensor, "c w"], Float[Tensor, "c"]]:
    """The gradients of the padded inputs, the weight, and a bias."""
    taps = weight.shape[1]
    pieces = list(_blocks(dy))
    products = dy.new_zeros(taps, len(dy), pieces[0].stop, dy.shape[2])
    for piece in pieces:
        for k in range(taps):
            products[k, :, : piece.stop - piece.start].addcmul_(dy[:, piece], padded[:, piece.start + k : piece.stop + k])
    dpadded = _sum_of_taps(dy.contiguous(), weight.flip(1), None, padding=taps - 1)
    return dpadded, products.sum((1, 2)).mT.contiguous(), dy.sum((0, 1))


@_forward.register_fake
def _(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return padded.new_empty(padded.shape[0], padded.shape[1] - weight.shape[1] + 1, padded.shape[2])


@_backward.register_fake
def _(padded: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return padded.new_empty(padded.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    padded, weight, bias = inputs
    ctx.save_for_backward(padded, weight)
    ctx.biased = bias is not None


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    dpadded, dweight, dbias = _backward(*ctx.saved_tensors, dy)
    return dpadded, dweight, dbias if ctx.biased else None


_forward.register_autograd(_differentiate, setup_context=_save)
