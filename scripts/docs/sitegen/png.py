"""PNG files of small arrays, a pixel an entry; the page enlarges them without smoothing."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

# Colours that show on white and on dark grey; opacity says how large an entry is.
POSITIVE, NEGATIVE = (13, 139, 161), (222, 110, 38)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """An RGBA image (height, width, 4) as a file."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def heat_map(values: npt.NDArray[np.float64]) -> bytes:
    """A matrix as a picture: opacity grows with a root of the size, so that small entries show too; the colour is the sign."""
    size = np.abs(values)
    largest = float(size.max()) or 1.0
    pixels = np.empty((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(values[..., None] >= 0, POSITIVE, NEGATIVE)
    pixels[..., 3] = np.rint(255 * (size / largest) ** 0.4)
    return png(pixels)
