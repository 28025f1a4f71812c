"""VMware's .vmss and .vmsn files, as crash's vmware_vmss.h has them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

PAGE = 4096
SUSPENDED, OLD = 0xBED2BED2, 0xBED2BED0
BLOCK, PACKED_BLOCK = 63, 62

Region = tuple[int, int, int]
"""Guest-physical page, page of the memory, and pages."""


def tag(name: str, value: int | bytes, *indices: int, nbytes: int = 4) -> bytes:
    """A tag with a number of `nbytes`, or with bytes that are shorter than a block."""
    data = value if isinstance(value, bytes) else value.to_bytes(nbytes, "little")
    return _start(name, len(data), indices) + data


def block(name: str, data: bytes, *indices: int, kind: int = BLOCK, padding: int = 0, wide: bool = True) -> bytes:
    """A tag with a block; wide: its lengths have 8 bytes, in old files 4."""
    lengths = struct.pack("<QQH" if wide else "<IIH", len(data), len(data), padding)
    return _start(name, kind, indices) + lengths + bytes(padding) + data


def _start(name: str, value_bits: int, indices: Sequence[int]) -> bytes:
    word = len(name) << 8 | len(indices) << 6 | value_bits
    return struct.pack("<H", word) + name.encode() + struct.pack(f"<{len(indices)}I", *indices)


def region_tags(regions: Sequence[Region]) -> bytes:
    """The tags that say where regions lie, in the order in which VMware writes them."""
    whole = tag("regionsCount", len(regions))
    for number, (address, place, pages) in enumerate(regions):
        whole += tag("regionPageNum", place, number) + tag("regionPPN", address, number)
        whole += tag("regionSize", pages, number)
    return whole


def metadata(memory: bytes, magic: int = SUSPENDED, groups: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """A .vmss file: groups of tags, the last of them `memory`."""
    whole = [*groups, ("memory", memory)]
    at = 12 + 80 * len(whole)
    table, body = b"", b""
    for name, tags in whole:
        table += name.encode().ljust(64, b"\0") + struct.pack("<QQ", at + len(body), len(tags) + 2)
        body += tags + bytes(2)
    return struct.pack("<III", magic, 8, len(whole)) + table + body


def vmss(regions: Sequence[Region]) -> bytes:
    """The metadata of a guest with these regions, and some that is passed over."""
    other = tag("hotSet", b"xyz") + block("gpregs", bytes(128), 0) + tag("CR64", 7, 0, 3, nbytes=8)
    memory = tag("align_mask", 4095, 0) + block("busmem", b"x" * 100, 1, padding=7) + region_tags(regions)
    return metadata(memory, groups=[("cpu", other)])
