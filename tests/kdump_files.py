"""kdump-compressed dumps made on the spot, as makedumpfile and QEMU write them: plain, flattened, split.

Format: makedumpfile's IMPLEMENTATION and diskdump_mod.h, QEMU's include/sysemu/dump.h.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from ksmdist import images

from .conftest import PAGE, ZERO, page

FLAGS = {"raw": 0, "zlib": 1, "lzo": 2, "snappy": 4, "zstd": 0x20}
"""page_desc.flags of each way a page is packed."""

LINUX = ("Linux", "guest", "6.1.0", "#1 SMP", "x86_64", "(none)")
"""utsname of makedumpfile's dumps."""

OF_QEMU = ("", "", "", "", "x86_64", "")
"""utsname of QEMU's."""

NOISE = np.random.default_rng(6).bytes(PAGE)
PAGES = {n: page(n) for n in (*range(1, 9), 40, 41, 1023, 1024, 1025, 33000, 40000)}
PAGES |= {0: ZERO, 42: ZERO, 1026: ZERO, 44: NOISE, 45: NOISE[::-1], 33001: NOISE}
"""Pages of a small dump, by page frame number."""

EXPECTED = {n * PAGE: PAGES[n] for n in sorted(PAGES)}
"""The same by address."""


def packer(compression: str) -> Callable[[bytes], bytes]:
    """What packs a page."""
    if compression == "zlib":
        return lambda page: zlib.compress(page, 1)
    if compression == "lzo":
        import lzallright

        return lzallright.LZOCompressor().compress
    if compression == "raw":
        return lambda page: page
    codec = pa.Codec(compression)
    return lambda page: bytes(codec.compress(page))


def kdump(
    pages: Mapping[int, bytes],
    memory: Iterable[int] | None = None,
    *,
    compression: str = "zlib",
    dump_level: int = 0,
    page_size: int = 4096,
    order: str = "<",
    version: int = 6,
    magic: bytes = b"KDUMP   ",
    utsname: Sequence[str] = LINUX,
    timestamp: int = 0,
    status: int | None = None,
    max_mapnr: int | None = None,
    sub_blocks: int = 1,
    zero_page: bool = True,
    single_bitmap: bool = False,
    split: tuple[int, int] | None = None,
    fields: Mapping[str, int] | None = None,
    descriptors: Mapping[int, tuple[int, int, int]] | None = None,
) -> bytes:
    """A dump of `pages`, by page frame number.

    memory: page frame numbers that there are, of which `pages` were dumped; None: these alone. zero_page: where the
    level leaves out zero pages, all that are dumped share one, as the producers have it. split: the range of a piece.
    fields: other values for fields of the headers, by name; descriptors: (offset, size, flags), by page frame number.
    """
    there = sorted(pages if memory is None else {*memory, *pages})
    top = there[-1] + 1 if there else 0
    given = {
        "header_version": version,
        "status": FLAGS[compression] if status is None else status,
        "block_size": page_size,
        "sub_hdr_size": sub_blocks,
        "bitmap_blocks": -(-top // (8 * page_size)) * (1 if single_bitmap else 2),
        "max_mapnr": top if max_mapnr is None else max_mapnr,
        "dump_level": dump_level,
        "split": int(split is not None),
        "start_pfn": split[0] if split else 0,
        "end_pfn": split[1] if split else 0,
        "size_eraseinfo": 0,
        "max_mapnr_64": top if max_mapnr is None else max_mapnr,
    }
    given |= {"start_pfn_64": given["start_pfn"], "end_pfn_64": given["end_pfn"]} | dict(fields or {})
    head = magic + struct.pack(order + "i", given["header_version"])
    head += b"".join(name.encode().ljust(65, b"\0") for name in utsname) + bytes(6)
    head += struct.pack(order + "qq", timestamp, 0)
    numbers = [given[name] for name in ("status", "block_size", "sub_hdr_size", "bitmap_blocks", "max_mapnr")]
    head += struct.pack(order + "10I", *numbers, 0, 0, 0, 0, 1)
    sub = struct.pack(order + "QiiQQ", 0, given["dump_level"], given["split"], given["start_pfn"], given["end_pfn"])
    sub += bytes(40) + struct.pack(order + "Q", given["size_eraseinfo"])
    sub += struct.pack(order + "QQQ", given["start_pfn_64"], given["end_pfn_64"], given["max_mapnr_64"])
    bitmaps = bitmap(there, page_size) + (b"" if single_bitmap else bitmap(pages, page_size, top))
    at = (1 + sub_blocks) * page_size + len(bitmaps) + 24 * len(pages)  # room for the descriptors of all pieces
    data, table, pack = b"", b"", packer(compression)
    shared = bool(dump_level & 1 and zero_page)
    if shared:
        data = bytes(page_size)
    for number in sorted(pages):
        if split is not None and not split[0] <= number < split[1]:
            continue
        content = pages[number]
        packed = pack(content)
        flags = FLAGS[compression] if len(packed) < page_size else 0
        told = at + len(data), len(packed) if flags else page_size, flags
        if shared and not content.strip(b"\0"):
            told = at, page_size, 0
        else:
            data += packed if flags else content
        table += struct.pack(order + "QIIQ", *(descriptors or {}).get(number, told), 0)
    body = head.ljust(page_size, b"\0") + sub.ljust(sub_blocks * page_size, b"\0") + bitmaps
    return body + table.ljust(24 * len(pages), b"\0") + data


def bitmap(numbers: Iterable[int], page_size: int = 4096, top: int = 0) -> bytes:
    """Bits of these pages, in whole blocks; of all up to `top`."""
    found = np.array(sorted(numbers), np.int64)
    top = max(top, int(found[-1]) + 1 if len(found) else 0)
    bits = np.zeros(-(-top // (8 * page_size)) * page_size * 8, np.uint8)
    bits[found] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def borders(data: bytes, order: str = "<") -> list[int]:
    """Bytes at which a structure of a dump ends, or a field that others hang on."""
    block, sub_blocks, bitmap_blocks = struct.unpack_from(order + "III", data, 428)
    bitmaps = block * (1 + sub_blocks)
    table = bitmaps + block * bitmap_blocks
    dumped = data[table - block * bitmap_blocks // 2 : table]
    count = sum(byte.bit_count() for byte in dumped)
    ends = [0, 8, 12, 402, 424, 428, 464, block, block + 104, bitmaps, table - len(dumped), table]
    for number in range(count):
        offset, nbytes = struct.unpack_from(order + "QI", data, table + 24 * number)
        ends += [table + 24 * (number + 1), offset, offset + nbytes]
    return sorted({end for end in ends if end <= len(data)})


def split_kdump(folder: Path, pages: Mapping[int, bytes], cuts: Sequence[int], **options: object) -> list[Path]:
    """The pieces of a split dump, [cuts[i], cuts[i + 1]) each, as files `piece.N` of a folder."""
    found = []
    for number, (start, end) in enumerate(pairwise(cuts)):
        found.append(folder / f"piece.{number}")
        found[-1].write_bytes(kdump(pages, split=(start, end), **options))  # type: ignore[arg-type]
    return found


def flattened(data: bytes, record: int = 1000) -> bytes:
    """A file as makedumpfile -F sends it, in records of so many bytes; QEMU's are of up to 16 KiB."""
    return flattened_records([(at, data[at : at + record]) for at in range(0, len(data), record)])


def flattened_records(records: Iterable[tuple[int, bytes]], end: bytes = struct.pack(">qq", -1, -1)) -> bytes:
    """A flattened file of these (offset, bytes), in the order in which they were written."""
    head = b"makedumpfile\0\0\0\0" + struct.pack(">qq", 1, 1)
    parts = [head.ljust(4096, b"\0")]
    for offset, data in records:
        parts += [struct.pack(">qq", offset, len(data)), data]
    return b"".join([*parts, end])


def written(folder: Path, data: bytes, name: str = "x.kdump") -> Path:
    """A file of these bytes."""
    path = folder / name
    path.write_bytes(data)
    return path


def info_of(path: Path | str) -> images.ImageInfo:
    """What is known of an image."""
    image = images.open_image(str(path))
    image.close()
    return image.info
