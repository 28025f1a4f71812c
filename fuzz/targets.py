"""What is fuzzed: each reader, and the images that its inputs begin as, of the makers in tests/."""

from __future__ import annotations

import gzip
import lzma
import random
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tests import criu_files, qemu_files, vmware_files
from tests.conftest import PAGE, ZERO, Row, arrow_image, elf_core, eligible, page
from tests.criu_files import LAZY, PARENT, PRESENT, Vma, mm, pagemap
from tests.kdump_files import OF_QEMU, flattened, flattened_records, kdump
from tests.lime_files import avml_file, lime_file


@dataclass(frozen=True)
class Target:
    """How a reader is fed.

    seeds: whole images to begin with, each the bytes of its files, in the order of `files`.
    files: names they are given; the first is opened. keep: bytes of magic of the first that mutations mostly leave.
    """

    seeds: Callable[[], list[list[bytes]]]
    files: tuple[str, ...] = ("image",)
    keep: int = 0

    def pack(self, files: list[bytes]) -> bytes:
        """An image's files as one input: the last as it is, before it each with its length."""
        return b"".join(struct.pack("<I", len(data)) + data for data in files[:-1]) + files[-1]

    def unpack(self, data: bytes) -> list[bytes]:
        """Files of an input; lengths that are too large are taken for what there is."""
        files = []
        for _ in self.files[:-1]:
            (nbytes,) = struct.unpack_from("<I", data.ljust(4, b"\0"))
            files.append(data[4 : 4 + nbytes])
            data = data[4 + nbytes :]
        return [*files, data]


def _raw() -> list[list[bytes]]:
    return [[page(1) + ZERO + page(2)], [page(1)]]


def _elf() -> list[list[bytes]]:
    some = page(1) + ZERO + page(2)
    return [
        [elf_core([(0, some, len(some)), (0xFFFC0000, page(3), 3 * PAGE)])],
        [elf_core([(0, some, len(some)), (PAGE, some, len(some)), (0x1800, page(3)[:0x800], 0x800)], order=">")],
        [elf_core([(0x7F0000000000, some, 9 * PAGE)], note=b"CORE", physical=False, xnum=True)],
    ]


def _arrow() -> list[list[bytes]]:
    rows: list[Row] = [
        (0, page(1), eligible()),
        (PAGE, None, eligible("zero_mapped")),
        (3 * PAGE, page(2), eligible("huge"), 7, "[heap]", 1),
        (9 * PAGE, None, eligible("unreadable")),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.arrow"
        return [[arrow_image(path, rows, batch=size).read_bytes()] for size in (2, 9)]


def _small() -> bytes:
    """An ELF core that is worth unpacking: a few pages, some of it repeating."""
    some = page(1) + ZERO + page(2)
    return elf_core([(0, some, len(some)), (8 * PAGE, ZERO * 3, 4 * PAGE)])


def _by_arrow(codec: str, data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def _gzip() -> list[list[bytes]]:
    small = _small()
    return [[gzip.compress(small)], [gzip.compress(small[:5000], 0) + gzip.compress(small[5000:]) + bytes(512)]]


def _xz() -> list[list[bytes]]:
    small = _small()
    halves = [lzma.compress(half, check=lzma.CHECK_NONE) for half in (small[:5000], small[5000:])]
    return [[lzma.compress(small)], [b"".join(halves)]]


def _zstd() -> list[list[bytes]]:
    small = _small()
    known = bytes(pa.Codec("zstd").compress(small))  # says how much it holds
    skipped = struct.pack("<II", 0x184D2A50, 8) + bytes(8)
    return [[known], [_by_arrow("zstd", small)], [skipped + _by_arrow("zstd", small[:5000]) + known]]


def _lz4() -> list[list[bytes]]:
    small = _small()
    return [[_by_arrow("lz4", small)], [_by_arrow("lz4", small[:5000]) + _by_arrow("lz4", small[5000:])]]


_SOME = {0: ZERO, 1: page(1), 2: page(2), 9: page(1), 40: page(3), 41: ZERO}


def _kdump() -> list[list[bytes]]:
    whole = [[kdump(_SOME, compression=name), b""] for name in ("zlib", "lzo", "snappy", "zstd", "raw")]
    others = [
        kdump(_SOME, range(44), dump_level=31),
        kdump(_SOME, range(44), dump_level=1, zero_page=False, order=">", version=3),
        kdump(_SOME, utsname=OF_QEMU, magic=b"DISKDUMP", version=1),
    ]
    pieces = [kdump(_SOME, split=span) for span in ((0, 5), (5, 42))]
    return [*whole, *([other, b""] for other in others), pieces]


def _flattened() -> list[list[bytes]]:
    dump = kdump(_SOME)
    records = [(at, dump[at : at + 3000]) for at in range(0, len(dump), 3000)]
    return [
        [flattened(dump, 16384)],
        [flattened_records([*records[1:], records[0], (9000, dump[9000:9100]), (20, dump[20:9000])])],
        [flattened(elf_core([(0, page(1) + ZERO, 2 * PAGE)]))],
    ]


_RANGES = [(0x1000, page(1) + ZERO), (0x100000, page(2) * 3), (1 << 32, page(3)[:2048])]


def _lime() -> list[list[bytes]]:
    return [[lime_file(_RANGES)], [lime_file([_RANGES[2], _RANGES[0], (0x1800, page(4))])]]


def _avml() -> list[list[bytes]]:
    noise = [(0x200000, random.Random(1).randbytes(80 << 10))]
    return [[avml_file(_RANGES)], [avml_file(noise, bytes([0xFE, 4, 0, 0]) + bytes(4))]]


_RAM = {
    "pc.ram": [page(1), ZERO, page(2), b"\xff" * PAGE, page(1), *[ZERO] * 7],
    "pc.bios": [page(3), page(4)],
    "0000:00:02.0/vga.vram": [page(5), ZERO],
}
_AGAIN = [("pc.bios", 0, page(6)), ("pc.ram", 2, page(4)), ("pc.ram", 11, page(7))]


def _sent() -> bytes:
    return qemu_files.migrated(_RAM, _AGAIN)


def _qemu() -> list[list[bytes]]:
    nodes = {"ram-node1": [ZERO, ZERO, page(1)], "ram-node0": [page(2)] * 9}
    return [
        [_sent()],
        [qemu_files.migrated(nodes, ended=False)],
    ]


def _mapped_ram() -> list[list[bytes]]:
    small = {"pc.ram": [ZERO, page(1), ZERO], "mem0": [page(2)]}
    return [[qemu_files.mapped_ram(_RAM)], [qemu_files.mapped_ram(small, align=512, shared=["mem0"])]]


def _libvirt() -> list[list[bytes]]:
    sent, header = _sent(), qemu_files.saved_header
    packed = [(1, gzip.compress(sent)), (3, lzma.compress(sent)), (5, _by_arrow("zstd", sent))]
    before = header(6, order=">")
    mapped = qemu_files.mapped_ram({"pc.ram": [ZERO, page(1), ZERO]}, qemu_files.Stream(len(before)))
    others = [before + mapped, header(magic=b"LibvirtQemudPart") + sent]
    return [[header() + sent], *([header(format) + data] for format, data in packed), *([other] for other in others)]


def _criu() -> list[list[bytes]]:
    some, at = page(1) + ZERO + page(2), 0x7F0000000000
    alone = pagemap(1, [(at, 2, PRESENT), (at + 9 * PAGE, 1, PRESENT)])
    child = pagemap(1, [(at, 2, PRESENT), (at + 2 * PAGE, 2, PARENT), (at + 9 * PAGE, 1, PRESENT)])
    parent = pagemap(1, [(at, 3, PRESENT), (at + 3 * PAGE, 1, LAZY)])
    heap, mapped = Vma(at, at + 4 * PAGE, madv=1 << 12), Vma(at + 8 * PAGE, at + 10 * PAGE, status=65, shmid=3)
    names = criu_files.files({3: "/usr/bin/true"})
    files = [mm([heap, mapped]), names]
    return [[alone, some, b"", b"", *files], [child, some, parent, some, *files]]


def _vmware() -> list[list[bytes]]:
    memory = page(1) + ZERO + page(2) + page(3)
    regions = [(0, 0, 3), (1 << 20, 3, 1)]
    block = vmware_files.block("Memory", memory, 0, 0, padding=7)
    within = vmware_files.metadata(vmware_files.region_tags(regions) + block)
    return [[vmware_files.vmss(regions), memory], [within, b""], [vmware_files.vmss([]), memory]]


_OF_PARENT = ("parent/pagemap-7.img", "parent/pages-1.img")
_CHECKPOINT = ("pagemap-7.img", "pages-1.img", *_OF_PARENT, "mm-7.img", "files.img")

TARGETS = {
    "raw": Target(_raw),
    "elf": Target(_elf, keep=6),
    "arrow": Target(_arrow, keep=6),
    "gzip": Target(_gzip, keep=3),
    "xz": Target(_xz, keep=6),
    "zstd": Target(_zstd, keep=4),
    "lz4": Target(_lz4, keep=4),
    "flattened": Target(_flattened, keep=12),
    "kdump": Target(_kdump, ("image", "image.1"), keep=8),
    "lime": Target(_lime, keep=8),
    "avml": Target(_avml, keep=8),
    "qemu": Target(_qemu, keep=8),
    "mapped-ram": Target(_mapped_ram, keep=8),
    "libvirt": Target(_libvirt, keep=16),
    "criu": Target(_criu, _CHECKPOINT, keep=8),
    "vmware": Target(_vmware, ("guest.vmss", "guest.vmem"), keep=4),
}
"""By name."""
