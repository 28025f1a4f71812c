"""How well contents.look() tells code, text and data apart: on the binaries and documents of this host."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ksmdist import contents
from ksmdist.tables import WHATS

PAGE_BYTES = 4096
FILES = 150  # of each folder
PAGES = 300  # of each file, at most
BINARIES = ("/usr/lib/x86_64-linux-gnu/*.so*", "/usr/lib/aarch64-linux-gnu/*.so*", "/usr/bin/*")
SECTIONS = (".text", ".rodata", ".dynstr", ".eh_frame", ".data.rel.ro", ".rela.dyn")
DOCUMENTS = ("usr/share/**/*.gz", "usr/lib/python3/**/*.py", "usr/share/locale/**/*.mo")


def sections(data: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of each section of a little-endian ELF64 file that has bytes in it."""
    if data[:6] != b"\x7fELF\2\1":
        return
    table, count, names = *struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HH", data, 0x3C)
    headers = [struct.unpack_from("<IIQQQQ", data, table + 64 * number) for number in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        if header[1] != 8:  # SHT_NOBITS
            yield data[start : data.index(b"\0", start)].decode(), header[4], header[5]


def pages(data: bytes, offset: int, nbytes: int) -> np.ndarray:
    """The pages that lie whole in these bytes of a file, as the page cache has them."""
    first = -(-offset // PAGE_BYTES) * PAGE_BYTES
    last = (offset + nbytes) // PAGE_BYTES * PAGE_BYTES
    return np.frombuffer(data[first : max(first, last)], np.uint8).reshape(-1, PAGE_BYTES)[:PAGES]


def main() -> None:
    found: dict[str, Counter[str]] = {}

    def count(name: str, rows: np.ndarray) -> None:
        if len(rows):
            found.setdefault(name, Counter()).update(WHATS[what] for what, _ in contents.look(rows))

    for pattern in BINARIES:
        for path in sorted({path.resolve() for path in Path("/").glob(pattern[1:]) if path.is_file()})[:FILES]:
            data = path.read_bytes()
            for name, offset, nbytes in sections(data):
                if name in SECTIONS:
                    count(name, pages(data, offset, nbytes))
    for pattern in DOCUMENTS:
        for path in sorted(path for path in Path("/").glob(pattern) if path.is_file())[: 2 * FILES]:
            data = path.read_bytes()
            count(pattern.rsplit("/", 1)[1], pages(data, 0, len(data)))
    print("| from | pages | called |\n|---|---|---|")
    for name, called in found.items():
        total = called.total()
        shares = ", ".join(f"{what} {100 * n / total:.1f} %" for what, n in called.most_common(4))
        print(f"| {name} | {total:,} | {shares} |")


if __name__ == "__main__":
    main()
