"""A sheet of images as one PNG, written without any library."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import torch
from torch.nn import functional

from lfm.distill._contract import Space

GAP, LEAST = 2, 32  # pixels between images, and of the shorter side of an image: small ones are enlarged


def save_sheet(images: torch.Tensor, space: Space, path: Path) -> None:
    """Write normalised images (n, channels, height, width) side by side; of more than 3 channels the first is shown."""
    pixels = ((images.detach().cpu() - space.low) / (space.high - space.low)).clamp(0, 1)
    pixels = pixels if pixels.shape[1] in (1, 3) else pixels[:, :1]
    times = max(1, -(-LEAST // min(pixels.shape[2:])))
    bytes_of = (pixels.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)
    bytes_of = bytes_of.repeat_interleave(times, 2).repeat_interleave(times, 3)
    columns = math.ceil(len(images) ** 0.5)
    missing = -len(images) % columns
    filled = functional.pad(bytes_of, (0, GAP, 0, GAP, 0, 0, 0, missing), value=255)  # what is between them is white
    _, _, height, width = filled.shape
    rows = filled.view(-1, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(-1, columns * width, 3)
    path.write_bytes(_png(rows))


def _png(rows: torch.Tensor) -> bytes:
    """Return an image (height, width, 3), uint8, as a file."""
    height, width, _ = rows.shape
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows.reshape(height, -1)], 1)  # 0: no filter
    packed = zlib.compress(lines.numpy().tobytes(), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(*part) for part in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    )


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
