"""One image in many formats, as their producers write them: 1 GiB of what memory holds, the same bytes in each."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ksmdist import images

PAGE_BYTES = 4096
PAGES = 1 << 18  # 1 GiB
RUN = 64  # pages that stay together


def make_formats(directory: Path, pages: int = PAGES) -> dict[str, Path]:
    """The image by name of the format; what needs a program that is not installed is left out.

    Made in a process of its own: what is started from one that was large once counts as large.
    """
    subprocess.run([sys.executable, __file__, str(directory), str(pages)], check=True)
    return {path.name.removeprefix("guest."): path for path in sorted(directory.glob("guest.*"))}


def _content(pages: int) -> np.ndarray:
    """40 % zero pages, 15 % in pairs; of the rest three quarters of programs and their data, one quarter random.

    Programs are this Python's: its libraries and sources. Each page has a number of its own, so that none is alike.
    """
    rng = np.random.default_rng(6)
    folders = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platlib")]
    real = bytearray()
    for path in sorted(path for folder in folders for ending in ("so", "py") for path in folder.rglob(f"*.{ending}")):
        real += path.read_bytes()
        if len(real) > 128 << 20:
            break
    library = np.frombuffer(bytes(real[: len(real) // PAGE_BYTES * PAGE_BYTES]), np.uint8).reshape(-1, PAGE_BYTES)
    image = np.zeros((pages, PAGE_BYTES), np.uint8)
    zero, noise = pages * 40 // 100, pages * 15 // 100
    image[zero:] = library[rng.integers(0, len(library), pages - zero)]
    image[zero : zero + noise] = rng.integers(0, 256, (noise, PAGE_BYTES), np.uint8)
    image[zero:, :8] = np.arange(pages - zero, dtype=np.uint64).view(np.uint8).reshape(-1, 8)
    pairs = pages * 7 // 100
    image[-pairs:] = image[-2 * pairs : -pairs]
    runs = rng.permutation(pages // RUN) * RUN
    return np.asarray(image[(runs[:, None] + np.arange(RUN)).reshape(-1)])


def _raw(image: np.ndarray, path: Path) -> None:
    image.tofile(path)


def _elf(image: np.ndarray, path: Path) -> None:
    """QEMU's dump-guest-memory: its pages begin at byte 1176 of the file (dump/dump.c)."""
    note = struct.pack("<III", 5, 0, 0) + b"QEMU\0\0\0\0"
    head = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    head += struct.pack("<IIQQQQQQ", 4, 0, 176, 0, 0, len(note), len(note), 0)
    head += struct.pack("<IIQQQQQQ", 1, 0, 1176, 0, 0, image.nbytes, image.nbytes, 0)
    with open(path, "wb") as sink:
        sink.write((head + note).ljust(1176, b"\0"))
        image.tofile(sink)


def _lime(image: np.ndarray, path: Path) -> None:
    """LiME's src/main.c: two ranges, each behind 32 bytes."""
    half = image.nbytes // 2
    with open(path, "wb") as sink:
        for start, part in ((0, image[: len(image) // 2]), (1 << 32, image[len(image) // 2 :])):
            sink.write(b"EMiL" + struct.pack("<IQQ8x", 1, start, start + half - 1))
            part.tofile(sink)


def _mapped_ram(image: np.ndarray, path: Path) -> None:
    """`migrate file:` with mapped-ram, docs/devel/migration/mapped-ram.rst; zero pages are holes."""
    stream = b"QEVM" + struct.pack(">IBI", 3, 7, 14) + b"pc-i440fx-10.0"
    stream += b"\5\x1aconfiguration/capabilities" + struct.pack(">II", 1, 1) + b"\x0amapped-ram"
    stream += struct.pack(">BI", 1, 2) + b"\3ram" + struct.pack(">II", 0, 4) + struct.pack(">Q", image.nbytes | 4)
    stream += b"\6pc.ram" + struct.pack(">Q", image.nbytes)
    bitmap_at, pages_at = len(stream) + 28, 1 << 20
    there = np.asarray(image.any(axis=1))
    end = struct.pack(">Q", 0x10)
    with open(path, "wb") as sink:
        sink.write(stream + struct.pack(">IQQQ", 1, PAGE_BYTES, bitmap_at, pages_at))
        sink.write(np.packbits(there, bitorder="little").tobytes())
        for at in np.flatnonzero(there).tolist():
            sink.seek(pages_at + at * PAGE_BYTES)
            sink.write(image[at])
        sink.seek(pages_at + image.nbytes)
        sink.write(end + struct.pack(">BI", 3, 2) + end + b"\0")


def _kdump(image: np.ndarray, path: Path) -> None:
    """QEMU's kdump-raw-zlib: level 1, what does not become smaller stays as it is, zero pages are one (dump/dump.c)."""
    pages = len(image)
    bitmap = np.packbits(np.ones(pages, np.uint8), bitorder="little").tobytes()
    blocks = -(-len(bitmap) // PAGE_BYTES)
    head = b"KDUMP   " + struct.pack("<i", 6) + bytes(260) + b"x86_64".ljust(65, b"\0") + bytes(65 + 6 + 16)
    head += struct.pack("<10I", 1, PAGE_BYTES, 1, 2 * blocks, pages, 0, 0, 0, 0, 1)
    sub = struct.pack("<QiiQQ", 0, 1, 0, 0, 0) + bytes(48) + struct.pack("<QQQ", 0, 0, pages)
    table_at = (2 + 2 * blocks) * PAGE_BYTES
    at = zero_at = table_at + 24 * pages
    there = np.asarray(image.any(axis=1))
    table = bytearray()
    with open(path, "wb") as sink:
        sink.write(head.ljust(PAGE_BYTES, b"\0") + sub.ljust(PAGE_BYTES, b"\0"))
        sink.write(2 * bitmap.ljust(blocks * PAGE_BYTES, b"\0"))
        sink.seek(at)
        at += sink.write(bytes(PAGE_BYTES))
        for number in range(pages):
            if not there[number]:
                table += struct.pack("<QIIQ", zero_at, PAGE_BYTES, 0, 0)
                continue
            packed = zlib.compress(image[number], 1)
            if len(packed) >= PAGE_BYTES:
                packed = image[number].tobytes()
            table += struct.pack("<QIIQ", at, len(packed), int(len(packed) < PAGE_BYTES), 0)
            at += sink.write(packed)
        sink.seek(table_at)
        sink.write(table)


def _flattened(image: np.ndarray, path: Path) -> None:
    """The kdump before it as QEMU writes it by default: in records, each with its place (makedumpfile -F)."""
    del image
    with open(path.with_name("guest.kdump-zlib"), "rb") as source, open(path, "wb") as sink:
        sink.write((b"makedumpfile\0\0\0\0" + struct.pack(">qq", 1, 1)).ljust(4096, b"\0"))
        at = 0
        while data := source.read(16384):
            sink.write(struct.pack(">qq", at, len(data)) + data)
            at += len(data)
        sink.write(struct.pack(">qq", -1, -1))


def _by(*command: str) -> Callable[[np.ndarray, Path], None]:
    def write(image: np.ndarray, path: Path) -> None:
        with open(path.with_name("guest.raw"), "rb") as source, open(path, "wb") as sink:
            subprocess.run(command, stdin=source, stdout=sink, check=True)

    return write


def _of_file(*command: str) -> Callable[[np.ndarray, Path], None]:
    """By its name, so that its size is written into what comes out."""

    def write(image: np.ndarray, path: Path) -> None:
        with open(path, "wb") as sink:
            subprocess.run([*command, str(path.with_name("guest.raw"))], stdout=sink, check=True)

    return write


def _arrow(image: np.ndarray, path: Path) -> None:
    """With no id in it: a run takes many links to it for as many images."""
    del image
    raw = images.open_image(str(path.with_name("guest.raw")))
    images.write_image([raw], str(path), image_id="")
    raw.close()


_WRITERS: dict[str, Callable[[np.ndarray, Path], None]] = {
    "raw": _raw,
    "arrow": _arrow,
    "elf": _elf,
    "lime": _lime,
    "mapped-ram": _mapped_ram,
    "kdump-zlib": _kdump,
    "kdump-zlib-flattened": _flattened,
    "raw.gz": _by("gzip", "-1", "-c"),
    "raw.zst": _by("zstd", "-q", "-3", "-c"),
    "raw.sized.zst": _of_file("zstd", "-q", "-3", "-c"),
    "raw.sized.lz4": _of_file("lz4", "-q", "--content-size", "-c"),
    "raw.lz4": _by("lz4", "-q", "-c"),
    "raw.xz": _by("xz", "-1", "-T0", "-c"),
}


def _make(directory: Path, pages: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    image: np.ndarray | None = None
    for name, write in _WRITERS.items():
        path = directory / f"guest.{name}"
        if path.exists():
            continue
        if image is None:
            image = _content(pages)
        partial = directory / "making"
        try:
            write(image, partial)
        except FileNotFoundError as missing:
            print(f"not measured, not installed: {missing.filename}", file=sys.stderr)
            partial.unlink(missing_ok=True)
            continue
        os.replace(partial, path)


if __name__ == "__main__":
    _make(Path(sys.argv[1]), int(sys.argv[2]))
