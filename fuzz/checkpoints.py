"""Small CRIU checkpoints and VMware snapshots.

Rules: CRIU, images/pagemap.proto and include/magic.h; VMware's groups and tags as volatility's vmware layer has them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

PAGEMAP = bytes.fromhex("1943565425400856")
PRESENT, PARENT, LAZY = 4, 1, 2


def number(field: int, value: int) -> bytes:
    """A number in a message of Protocol Buffers."""
    digits = bytearray([field << 3])
    while value >= 128:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes(digits) + bytes([value])


def pagemap(pages_id: int, runs: Sequence[tuple[int, int, int]]) -> bytes:
    """pagemap-PID.img: runs of (address, pages, flags)."""
    records = [number(1, pages_id)]
    records += [number(1, at) + number(2, count) + number(4, flags) for at, count, flags in runs]
    return PAGEMAP + b"".join(struct.pack("<I", len(record)) + record for record in records)


def vmss(tags: Mapping[tuple[str, tuple[int, ...]], int | bytes], group: str = "memory") -> bytes:
    """A .vmss or .vmsn with one group of tags: (name, indices) -> a number of 4 bytes, or a block of bytes."""
    body = b""
    for (name, indices), value in tags.items():
        kind = 4 if isinstance(value, int) else 63
        body += struct.pack("BB", len(indices) << 6 | kind, len(name)) + name.encode()
        body += struct.pack(f"<{len(indices)}I", *indices)
        if isinstance(value, int):
            body += struct.pack("<I", value)
        else:
            body += struct.pack("<QQH", len(value), len(value), 0) + value
    head = struct.pack("<III", 0xBED2BED2, 8, 1)
    return head + group.encode().ljust(64, b"\0") + struct.pack("<QQ", 12 + 80, len(body) + 2) + body + bytes(2)
