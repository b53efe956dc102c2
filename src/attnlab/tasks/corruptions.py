"""Common corruptions of images at five severities, and what they cost a classifier (Hendrycks and Dietterich 2019)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.errors import UnknownNameError, nearest
from attnlab.models.sampling import evaluating
from attnlab.tasks.contract import Split
from attnlab.tasks.digits import Digits

Images = Float[Tensor, "b c h w"]
SEVERITIES = (1, 2, 3, 4, 5)

# one setting a severity; those of CIFAR-10-C, made for images of 32 pixels a side
SETTINGS: dict[str, tuple[tuple[float, ...], ...]] = {
    "gaussian_noise": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
    "shot_noise": ((500.0,), (250.0,), (100.0,), (75.0,), (50.0,)),
    "impulse_noise": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1.0, 1.0), (0.25, 1.0, 1.0), (0.4, 1.0, 1.0), (0.25, 1.0, 2.0), (0.4, 1.0, 2.0)),
    "motion_blur": ((6.0, 1.0), (6.0, 1.5), (6.0, 2.0), (8.0, 2.0), (9.0, 2.5)),
    "zoom_blur": ((1.05,), (1.10,), (1.15,), (1.20,), (1.25,)),
    "fog": ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
    "brightness": ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
    "contrast": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
    "elastic": ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
    "jpeg": ((80.0,), (65.0,), (58.0,), (50.0,), (40.0,)),
}
"""The strengths of each corruption. Snow and frost are not here: frost needs photographs, snow a compositor's blur."""


def corrupt(images: Images, name: str, severity: int, generator: torch.Generator) -> Images:
    """Images with one corruption; what is random is drawn for each image.

    Args:
        images: in [0, 1], (batch, channels, height, width).
        name: one of `SETTINGS`.
        severity: 1 to 5.
        generator: the only source of chance, on the CPU.

    Raises:
        UnknownNameError: for an unknown corruption.
        ValueError: for another severity.
        ImportError: for "jpeg" without Pillow.
    """
    if name not in SETTINGS:
        raise UnknownNameError(f"name: expected one of {tuple(SETTINGS)}, got {name!r}{nearest(name, SETTINGS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: expected 1 to 5, got {severity}")
    return _FUNCTIONS[name](images, generator, *SETTINGS[name][severity - 1]).clamp(0.0, 1.0)


def _gaussian_noise(x: Tensor, g: torch.Generator, scale: float) -> Tensor:
    return x + scale * torch.randn(x.shape, generator=g, dtype=x.dtype)


def _shot_noise(x: Tensor, g: torch.Generator, photons: float) -> Tensor:
    return torch.poisson(x * photons, generator=g) / photons


def _impulse_noise(x: Tensor, g: torch.Generator, share: float) -> Tensor:
    hit, high = (torch.rand(x.shape, generator=g) for _ in range(2))
    return torch.where(hit < share, (high < 0.5).to(x.dtype), x)


def _gaussian_kernel(sigma: float, radius: int, dtype: torch.dtype) -> Float[Tensor, "_"]:
    offsets = torch.arange(-radius, radius + 1, dtype=dtype)
    weights = torch.exp(-0.5 * (offsets / max(sigma, 1e-6)) ** 2)
    return weights / weights.sum()


def _convolve(x: Tensor, kernels: Float[Tensor, "b k l"]) -> Tensor:
    """Each image with its own kernel, its border repeated outwards."""
    b, c, h, w = x.shape
    k, l = kernels.shape[1:]
    padded = F.pad(x, (l // 2, l // 2, k // 2, k // 2), mode="replicate")
    weight = kernels[:, None].expand(-1, c, -1, -1).reshape(b * c, 1, k, l)
    return F.conv2d(padded.reshape(1, b * c, *padded.shape[2:]), weight, groups=b * c).view(b, c, h, w)


def _blur(x: Tensor, sigma: float) -> Tensor:
    line = _gaussian_kernel(sigma, max(1, math.ceil(4 * sigma)), x.dtype)
    return _convolve(x, (line[:, None] * line).expand(len(x), -1, -1))


def _defocus_blur(x: Tensor, g: torch.Generator, radius: float, soft: float) -> Tensor:
    """A disk, its rim softened by a 3x3 Gaussian."""
    reach = math.floor(radius) + 1
    line = torch.arange(-reach, reach + 1, dtype=x.dtype)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).to(x.dtype)[None, None]
    rim = _gaussian_kernel(soft, 1, x.dtype)
    kernel = F.conv2d(F.pad(disk, (1, 1, 1, 1)), (rim[:, None] * rim)[None, None])[0]
    return _convolve(x, (kernel / kernel.sum()).expand(len(x), -1, -1))


def _glass_blur(x: Tensor, g: torch.Generator, sigma: float, reach: float, rounds: float) -> Tensor:
    """Blur, exchange every pixel with one nearby, row by row from the last, and blur again."""
    x = _blur(x, sigma).clone()
    far, (h, w), rows = int(reach), x.shape[2:], torch.arange(len(x))
    for _ in range(int(rounds)):
        for i in range(h - 1 - far, far - 1, -1):
            for j in range(w - 1 - far, far - 1, -1):
                di, dj = torch.randint(-far, far + 1, (2, len(x)), generator=g)
                here, there = x[:, :, i, j].clone(), x[rows, :, i + di, j + dj].clone()
                x[rows, :, i + di, j + dj] = here
                x[:, :, i, j] = there
    return _blur(x, sigma)


def _motion_blur(x: Tensor, g: torch.Generator, radius: float, sigma: float) -> Tensor:
    """A half Gaussian along a line of -45 to 45 degrees, spread over the pixels on both sides of it."""
    reach = int(radius)
    angle = (torch.rand(len(x), generator=g, dtype=x.dtype) - 0.5) * math.pi / 2
    kernels = x.new_zeros(len(x), 2 * reach + 1, 2 * reach + 1)
    rows = torch.arange(len(x))
    weights = torch.exp(-0.5 * (torch.arange(reach + 1, dtype=x.dtype) / sigma) ** 2)
    for step, weight in enumerate(weights.tolist()):
        height, width = step * angle.sin() + reach, step * angle.cos() + reach
        for top, left in ((0, 0), (0, 1), (1, 0), (1, 1)):
            i, j = (height.floor() + top).clamp(max=2 * reach), (width.floor() + left).clamp(max=2 * reach)
            near = (1 - (height - height.floor() - top).abs()) * (1 - (width - width.floor() - left).abs())
            kernels.index_put_((rows, i.long(), j.long()), weight * near, accumulate=True)
    return _convolve(x, kernels / kernels.sum((1, 2), keepdim=True))


def _sample(x: Tensor, rows: Float[Tensor, "b h w"], columns: Float[Tensor, "b h w"]) -> Tensor:
    """Bilinear values at positions in pixels, reflected at the border."""
    h, w = x.shape[2:]
    grid = torch.stack(((2 * columns + 1) / w - 1, (2 * rows + 1) / h - 1), -1)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _places(x: Tensor) -> tuple[Tensor, Tensor]:
    b, _, h, w = x.shape
    rows, columns = torch.meshgrid(torch.arange(h, dtype=x.dtype), torch.arange(w, dtype=x.dtype), indexing="ij")
    return rows.expand(b, h, w), columns.expand(b, h, w)


def _zoom_blur(x: Tensor, g: torch.Generator, most: float) -> Tensor:
    """Mean of the image and of it magnified by 1, 1.01, ... up to ``most``."""
    rows, columns = _places(x)
    middle = [(side - 1) / 2 for side in x.shape[2:]]
    factors = [1.0 + 0.01 * step for step in range(round((most - 1) / 0.01) + 1)]
    zoomed = [_sample(x, (rows - middle[0]) / f + middle[0], (columns - middle[1]) / f + middle[1]) for f in factors]
    return torch.stack([x, *zoomed]).mean(0)


def plasma(count: int, side: int, decay: float, generator: torch.Generator) -> Float[Tensor, "b s s"]:
    """Plasma fractals in [0, 1], periodic, by midpoint displacement: each halving of the step divides the noise by ``decay``.

    Args:
        count: maps.
        side: of a map, a power of two.
        decay: above 1; the larger, the smoother.
        generator: source of the displacements.
    """
    heights = torch.zeros(count, 1, 1)
    spread = 1.0
    while heights.shape[1] < side:
        n = 2 * heights.shape[1]

        def noise(m: int = n // 2, spread: float = spread) -> Tensor:
            return spread * (2 * torch.rand(count, m, m, generator=generator) - 1)

        finer = heights.new_zeros(count, n, n)
        right = heights.roll(-1, 2)
        centre = (heights + right + heights.roll(-1, 1) + right.roll(-1, 1)) / 4 + noise()
        finer[:, ::2, ::2], finer[:, 1::2, 1::2] = heights, centre
        finer[:, ::2, 1::2] = (heights + right + centre + centre.roll(1, 1)) / 4 + noise()
        finer[:, 1::2, ::2] = (heights + heights.roll(-1, 1) + centre + centre.roll(1, 2)) / 4 + noise()
        heights, spread = finer, spread / decay
    low, high = heights.amin((1, 2), keepdim=True), heights.amax((1, 2), keepdim=True)
    return (heights - low) / (high - low).clamp(min=1e-12)


def _fog(x: Tensor, g: torch.Generator, strength: float, decay: float) -> Tensor:
    h, w = x.shape[2:]
    side = 2 ** math.ceil(math.log2(max(h, w, 2)))
    brightest = x.amax((1, 2, 3), keepdim=True)
    foggy = x + strength * plasma(len(x), side, decay, g)[:, None, :h, :w].to(x.dtype)
    return foggy * brightest / (brightest + strength)


def _brightness(x: Tensor, g: torch.Generator, more: float) -> Tensor:
    """The value of HSV raised: the largest channel, and the others in proportion."""
    value = x.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1.0)
    return torch.where(value > 0, x * raised / value.clamp(min=1e-12), raised)


def _contrast(x: Tensor, g: torch.Generator, less: float) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * less + mean


def _elastic(x: Tensor, g: torch.Generator, strength: float, smooth: float, affine: float) -> Tensor:
    """An affine map that moves three points by up to ``affine``, then smoothed random shifts; both as shares of the side."""
    b, side = len(x), x.shape[-1]
    rows, columns = _places(x)
    third = side // 3
    ones = torch.ones(b, 3, 1, dtype=x.dtype)
    corners = torch.tensor([[third, third], [third, -third], [-third, -third]], dtype=x.dtype).expand(b, -1, -1)
    moved = corners + affine * side * (2 * torch.rand(b, 3, 2, generator=g, dtype=x.dtype) - 1)
    matrix = torch.linalg.solve(torch.cat((moved, ones), -1).double(), corners.double()).to(x.dtype)
    middle = torch.tensor([(x.shape[2] - 1) / 2, (side - 1) / 2], dtype=x.dtype)
    place = torch.stack((rows - middle[0], columns - middle[1], torch.ones_like(rows)), -1)
    source = (place[..., None] * matrix[:, None, None]).sum(-2) + middle
    x = _sample(x, *source.unbind(-1))
    shifts = 2 * torch.rand(b, 2, *x.shape[2:], generator=g, dtype=x.dtype) - 1
    shifts = strength * side * (_blur(shifts, smooth * side) if smooth else shifts)
    return _sample(x, rows + shifts[:, 0], columns + shifts[:, 1])


def _pixelate(x: Tensor, g: torch.Generator, share: float) -> Tensor:
    h, w = x.shape[2:]
    return F.interpolate(F.adaptive_avg_pool2d(x, (max(1, int(h * share)), max(1, int(w * share)))), (h, w), mode="nearest-exact")


def _jpeg(x: Tensor, g: torch.Generator, quality: float) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("corruption 'jpeg' needs Pillow: pip install pillow") from error
    done = []
    for one in (x * 255).round().to(torch.uint8).numpy():
        stream = io.BytesIO()
        Image.fromarray(one[0] if len(one) == 1 else one.transpose(1, 2, 0)).save(stream, "JPEG", quality=int(quality))
        read = np.array(Image.open(stream), dtype=np.float32) / 255
        done.append(torch.from_numpy(read[None] if read.ndim == 2 else read.transpose(2, 0, 1).copy()).to(x.dtype))
    return torch.stack(done)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic": _elastic,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}


def corruption_errors(
    model: nn.Module, task: Digits, split: Split = "test", *, names: Iterable[str] | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """Error rates of a classifier on corrupted digits: for each corruption those at severities 1 to 5, and "clean" (one number).

    Args:
        model: what `task` is solved by.
        task: the digits task; its patches are put together, corrupted, and cut again.
        split: "valid" or "test".
        names: corruptions; None for all.
        seed: of the corruptions, the same for every model: each corruption and severity has its own stream.
    """
    scale, shift = 6.0 / 16.0, 4.9 / 16.0  # the task's images have 16 levels, less 4.9, over 6
    device = next(model.parameters()).device
    (batch,) = task.eval_batches(10_000, split)
    images = batch.inputs * scale + shift
    side, p = 8 // task.patch, task.patch
    images = images.view(-1, side, side, p, p).transpose(2, 3).reshape(-1, 1, 8, 8)

    def error(corrupted: Images) -> float:
        patches = corrupted.view(-1, side, p, side, p).transpose(2, 3).reshape(batch.inputs.shape)
        with evaluating(model):
            logits = torch.cat([model(part.to(device)).cpu() for part in ((patches - shift) / scale).split(64)])
        return float((logits.argmax(-1) != batch.targets).double().mean())

    errors = {"clean": [error(images)]}
    for name in SETTINGS if names is None else names:
        streams = [torch.Generator().manual_seed(5 * (seed * 100 + list(SETTINGS).index(name)) + level) for level in range(5)]
        errors[name] = [error(corrupt(images, name, s, stream)) for s, stream in zip(SEVERITIES, streams, strict=True)]
    return errors


def mean_corruption_error(
    errors: Mapping[str, list[float]], baseline: Mapping[str, list[float]], *, relative: bool = False
) -> tuple[float, dict[str, float]]:
    r"""Mean over corruptions of $CE_c = \sum_s E_{s,c} / \sum_s E^{base}_{s,c}$, and each of them.

    Args:
        errors: of the model, as `corruption_errors` gives them.
        baseline: of the model that is compared with, likewise.
        relative: subtract each model's clean error first: what the corruption adds.

    Raises:
        ValueError: if the corruptions differ, or the baseline makes no error in one.
    """
    names = [name for name in errors if name != "clean"]
    if set(errors) != set(baseline) or not names:
        raise ValueError(f"errors, baseline: expected the same corruptions, got {sorted(errors)} and {sorted(baseline)}")
    own, base = (values["clean"][0] if relative else 0.0 for values in (errors, baseline))
    ratios = {}
    for name in names:
        below = sum(value - base for value in baseline[name])
        if below == 0.0:
            raise ValueError(f"baseline: expected errors to compare with under {name!r}, got none")
        ratios[name] = sum(value - own for value in errors[name]) / below
    return sum(ratios.values()) / len(ratios), ratios
