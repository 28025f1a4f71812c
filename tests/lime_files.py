"""LiME and AVML files, written as their sources have them."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import pyarrow as pa

Range = tuple[int, bytes]
"""First address, and bytes from there on."""

CHUNK = 64 << 10
IDENTIFIER = b"\xff\x06\x00\x00sNaPpY"


def lime_header(start: int, last: int, magic: bytes = b"EMiL", version: int = 1) -> bytes:
    """lime_mem_range_header of LiME's src/lime.h."""
    return magic + struct.pack("<IQQ8x", version, start, last)


def lime_file(ranges: Sequence[Range]) -> bytes:
    """Ranges in the order given, each behind its header (LiME's src/main.c)."""
    return b"".join(lime_header(start, start + len(data) - 1) + data for start, data in ranges)


def avml_file(ranges: Sequence[Range], extra: bytes = b"") -> bytes:
    """Ranges in the order given, as AVML's SnapCountWriter packs them. extra: chunks behind each identifier."""
    whole = b""
    for start, data in ranges:
        stream = IDENTIFIER + extra + b"".join(chunk(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK))
        whole += lime_header(start, start + len(data) - 1, b"AVML", 2) + stream + struct.pack("<Q", len(stream))
    return whole


def chunk(data: bytes) -> bytes:
    """A chunk of snappy's framing format: packed where that saves an eighth, as the snap crate does."""
    packed = bytes(pa.Codec("snappy").compress(data))
    kind, body = (0, packed) if len(packed) < len(data) - len(data) // 8 else (1, data)
    checksum = crc32c(data)
    masked = ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return bytes([kind]) + (len(body) + 4).to_bytes(3, "little") + struct.pack("<I", masked) + body


@functools.cache
def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


@functools.lru_cache(maxsize=256)
def crc32c(data: bytes) -> int:
    """RFC 3720, section 12.1."""
    table, value = _table(), 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF
