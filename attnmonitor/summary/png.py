"""Pictures as PNG files, made here without matplotlib or Pillow, which a page or a notebook need not have."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

__all__ = ["png_of"]


def png_of(rows: Iterable[bytes], width: int, palette: bytes = b"") -> bytes:
    """Return a picture as a PNG (RFC 2083).

    Args:
        rows: From top to bottom, three bytes for each pixel; with a palette one, its place there.
        width: Pixels in a row.
        palette: Colors of three bytes each.
    """
    unfiltered = [b"\0" + row for row in rows]
    header = struct.pack(">IIBBBBB", width, len(unfiltered), 8, 3 if palette else 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    colors = chunk(b"PLTE", palette) if palette else b""
    pixels = chunk(b"IDAT", zlib.compress(b"".join(unfiltered), 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colors + pixels + chunk(b"IEND", b"")
