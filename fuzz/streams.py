"""QEMU's migration streams of a few pages: as they are sent, with mapped-ram, and as libvirt saves them.

Rules: QEMU, migration/savevm.c and ram.c, docs/devel/migration/mapped-ram.rst; libvirt, src/qemu/qemu_saveimage.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

PAGE = 4096
_ZERO, _MEM_SIZE, _PAGE, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20

_XML = b"<domain type='kvm'><name>guest</name></domain>\0"
SAVED_BYTES = 92 + len(_XML)
"""Before the stream, in what saved() makes."""

Record = tuple[str, int, bytes]
"""Block, number of the page in it, and its bytes."""


def _text(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


def _head(machine: str, capabilities: Sequence[str] = ()) -> bytes:
    head = b"QEVM" + struct.pack(">IBI", 3, 7, len(machine)) + machine.encode()
    if capabilities:
        head += b"\5" + _text("configuration/capabilities") + struct.pack(">II", 1, len(capabilities))
        head += b"".join(map(_text, capabilities))
    return head + struct.pack(">BI", 1, 2) + _text("ram") + struct.pack(">II", 0, 4)


def _sizes(blocks: dict[str, int]) -> bytes:
    return struct.pack(">Q", sum(blocks.values()) * PAGE | _MEM_SIZE)


def stream(blocks: dict[str, int], parts: Sequence[Sequence[Record]], machine: str = "pc-i440fx-10.0") -> bytes:
    """Blocks of so many pages, and their pages in several parts; one that is full of one byte is sent as that byte."""
    end, footer = struct.pack(">Q", _EOS), struct.pack(">BI", 0x7E, 2)
    data = _head(machine) + _sizes(blocks)
    data += b"".join(_text(name) + struct.pack(">Q", pages * PAGE) for name, pages in blocks.items()) + end + footer
    for number, part in enumerate(parts):
        data += struct.pack(">BI", 3 if number == len(parts) - 1 else 2, 2)
        before = ""
        for block, page, content in part:
            alike = content == content[:1] * PAGE
            flags = (_ZERO if alike else _PAGE) | (_CONTINUE if block == before else 0)
            data += struct.pack(">Q", page * PAGE | flags) + (b"" if block == before else _text(block))
            data += content[:1] if alike else content
            before = block
        data += end + footer
    return data + b"\0"


def mapped_ram(blocks: dict[str, int], records: Sequence[Record], align: int = PAGE, before: int = 0) -> bytes:
    """The same with mapped-ram: for each block a bitmap, and its pages where they are; QEMU aligns them to 1 MiB.

    before: bytes that are in the file before the stream.
    """
    data = bytearray(bytes(before) + _head("pc-q35-9.2", ["mapped-ram"]) + _sizes(blocks))
    for name, pages in blocks.items():
        there = {page: content for block, page, content in records if block == name}
        bitmap_at = len(data) + 1 + len(name) + 8 + 28
        words = [sum(1 << bit for bit in range(64) if at + bit in there) for at in range(0, pages, 64)]
        pages_at = -(-(bitmap_at + 8 * len(words)) // align) * align
        data += _text(name) + struct.pack(">QIQQQ", pages * PAGE, 1, PAGE, bitmap_at, pages_at)
        data += struct.pack(f"<{len(words)}Q", *words)
        data += bytes(pages_at + pages * PAGE - len(data))
        for page, content in there.items():
            data[pages_at + page * PAGE : pages_at + (page + 1) * PAGE] = content
    end = struct.pack(">Q", _EOS)
    return bytes(data[before:]) + end + struct.pack(">BI", 3, 2) + end + b"\0"


def saved(data: bytes, format: int = 0, order: str = "<", magic: bytes = b"LibvirtQemudSave") -> bytes:
    """A stream as `virsh save` keeps it, behind its header and the domain's XML; format: how `data` is compressed."""
    return magic + struct.pack(order + "5I", 2, len(_XML), 1, format, 0) + bytes(56) + _XML + data
