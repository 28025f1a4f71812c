"""CRIU checkpoints, written as its images/*.proto and criu/image.c have them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096
COMMON, PAGEMAP, MM, CORE, FILES, INVENTORY = (
    struct.pack("<I", magic) for magic in (0x54564319, 0x56084025, 0x57492820, 0x55053847, 0x56303138, 0x58313116)
)
PARENT, LAZY, PRESENT = 1, 2, 4
PRIVATE, SHARED, LOCKED, HUGETLB = 0x02, 0x01, 0x2000, 0x40000
REGULAR, STACK, VSYSCALL, VDSO, HEAP = 1, 2, 4, 8, 1 << 5
FILE_PRIVATE, FILE_SHARED, ANON_SHARED, ANON_PRIVATE, GUARD = 1 << 6, 1 << 7, 1 << 8, 1 << 9, 1 << 16
MERGEABLE = 1 << 12

Run = tuple[int, int, int | None]
"""Address, pages and flags of a pagemap's entry; None: an old one without flags."""


def varint(value: int) -> bytes:
    """A number of Protocol Buffers."""
    digits = bytearray()
    while value >= 128:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def message(fields: Sequence[tuple[int, int | bytes]]) -> bytes:
    """A message with these fields, in this order."""
    whole = b""
    for number, value in fields:
        if isinstance(value, int):
            whole += varint(number << 3) + varint(value)
        else:
            whole += varint(number << 3 | 2) + varint(len(value)) + value
    return whole


def img(magic: bytes, records: Sequence[bytes]) -> bytes:
    """An image file: magic, then each record behind its length."""
    return COMMON + magic + b"".join(struct.pack("<I", len(record)) + record for record in records)


def pagemap(pages_id: int, runs: Sequence[Run], old: bool = False) -> bytes:
    """pagemap-PID.img. old: as CRIU wrote it before 2017, in_parent instead of flags."""
    records = [message([(1, pages_id)])]
    for address, count, flags in runs:
        if flags is None or old:
            more: list[tuple[int, int | bytes]] = [(3, 1)] if flags == PARENT else []
            records.append(message([(1, address), (2, count), *more]))
        else:
            records.append(message([(1, address), (2, count & 0xFFFFFFFF), (4, flags), (5, count)]))
    return img(PAGEMAP, records)


@dataclass(frozen=True)
class Vma:
    """A vma_entry."""

    start: int
    end: int
    flags: int = PRIVATE | 0x20
    status: int = REGULAR | ANON_PRIVATE
    madv: int | None = None
    shmid: int = 0

    def record(self) -> bytes:
        fields: list[tuple[int, int | bytes]] = [(1, self.start), (2, self.end), (3, 0), (4, self.shmid), (5, 3)]
        fields += [(6, self.flags), (7, self.status), (8, 1)]  # fd -1, as sint64
        return message(fields if self.madv is None else [*fields, (9, self.madv)])


def mm(mappings: Sequence[Vma]) -> bytes:
    """mm-PID.img."""
    numbers: list[tuple[int, int | bytes]] = [(field, 0x400000 + field) for field in range(1, 13)]
    numbers += [(13, word) for word in (33, 2**63 + 5, 0)]
    return img(MM, [message([*numbers, *((14, mapping.record()) for mapping in mappings), (15, 1)])])


def core(command: str) -> bytes:
    """core-PID.img, of what is read of it."""
    task = message([(1, 1), (2, 0), (3, 0), (4, 0), (5, 0), (6, command.encode())])
    return img(CORE, [message([(1, 1), (2, message([(1, 7)])), (3, task)])])


def files(names: Mapping[int, str]) -> bytes:
    """files.img with regular files, and a pipe."""
    entries = []
    for number, name in names.items():
        entry = message([(1, number), (2, 0), (3, 0), (5, b""), (6, name.encode())])
        entries.append(message([(1, 1), (2, number), (3, entry)]))
    return img(FILES, [*entries, message([(1, 2), (2, 99), (17, message([(1, 99), (2, 5)]))])])


def save(folder: Path, contents: Mapping[str, bytes]) -> Path:
    """Write a checkpoint's files; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def checkpoint(
    folder: Path,
    runs: Sequence[Run],
    pages: bytes,
    mappings: Sequence[Vma] | None = None,
    pid: int | str = 7,
    pages_id: int = 1,
    parent: str | None = None,
    command: str = "",
    names: Mapping[int, str] | None = None,
    old: bool = False,
) -> Path:
    """The files of one process; its pagemap. parent: where the link of that name leads."""
    contents = {f"pagemap-{pid}.img": pagemap(pages_id, runs, old), f"pages-{pages_id}.img": pages}
    contents["inventory.img"] = INVENTORY + bytes(8)
    if mappings is not None:
        contents[f"mm-{pid}.img"] = mm(mappings)
    if command:
        contents[f"core-{pid}.img"] = core(command)
    if names is not None:
        contents["files.img"] = files(names)
    save(folder, contents)
    if parent is not None:
        (folder / "parent").symlink_to(parent)
    return folder / f"pagemap-{pid}.img"
