"""How many bytes a compressed file holds, and where its frames begin, by their headers: nothing is unpacked.

What these say is a claim of the file, which unpacking it confirms or not.
Formats: RFC 8878 (zstd), LZ4 frame format 1.6, the .xz file format 1.2.
"""

from __future__ import annotations

from collections.abc import Callable

from ksmdist.images.files import ImageFile

__all__ = ["SKIPPABLE", "lz4_frames", "xz_size", "zstd_frames"]

SKIPPABLE = range(0x184D2A50, 0x184D2A60)
"""Magic numbers of frames that hold nothing to unpack, of zstd and LZ4 alike."""

Starts = list[tuple[int, int]]
"""(byte of what is held, byte in the file) of frames, ascending; the first is (0, 0)."""

_ZSTD = 0xFD2FB528
_LZ4 = 0x184D2204
_CUT_OFF = -1
_ZSTD_BLOCK = 128 << 10  # most bytes a block holds
_MOST_RATIO = 1 << 16  # bytes held for one of the file: a zstd block holds 128 KiB in 4 bytes, others less
_MOST_PADDING = 1 << 20  # bytes of zeros behind streams of xz, in all
_MOST_INDEX = 1 << 24  # bytes of an xz file's index: two million blocks


def zstd_frames(file: ImageFile, apart: int) -> tuple[int, Starts]:
    """The sum of what a zstd file's frames say they hold, and starts of theirs; (0, []) where one does not say.

    apart: bytes between starts at least, so that they are few. (0, []) also where they say more than the file can
    hold: where it is cut off, its blocks do not say how many there were.
    """
    return _frames(file, _zstd_frame, apart)


def lz4_frames(file: ImageFile, apart: int) -> tuple[int, Starts]:
    """The same of an LZ4 file."""
    return _frames(file, _lz4_frame, apart)


def _frames(
    file: ImageFile, frame: Callable[[ImageFile, int, bytes], tuple[int, int] | None], apart: int
) -> tuple[int, Starts]:
    at, total = 0, 0
    starts: Starts = [(0, 0)]
    while at < file.nbytes:
        head = file.read(at, 18)
        if int.from_bytes(head[:4], "little") in SKIPPABLE and len(head) >= 8:
            at += 8 + int.from_bytes(head[4:8], "little")
            continue
        found = frame(file, at, head)
        if found is None:
            return 0, []
        size, end = found
        if total >= starts[-1][0] + apart:
            starts.append((total, at))
        total += size
        if end == _CUT_OFF:
            break
        at = end
    return (total, starts) if total <= file.nbytes * _MOST_RATIO else (0, [])


def _zstd_frame(file: ImageFile, at: int, head: bytes) -> tuple[int, int] | None:
    """(bytes it holds, its end in the file) of a frame; None where it does not say, or more than its blocks can hold.

    Its end is _CUT_OFF where the file ends within it: what there is can still be read.
    """
    if int.from_bytes(head[:4], "little") != _ZSTD or len(head) < 6:
        return None
    said = head[4]
    single, size_code = said >> 5 & 1, said >> 6
    size_at = 5 + (not single) + (0, 1, 2, 4)[said & 3]
    size_bytes = (single, 2, 4, 8)[size_code]
    if not size_bytes or len(head) < size_at + size_bytes:
        return None
    size = int.from_bytes(head[size_at : size_at + size_bytes], "little") + 256 * (size_code == 1)
    at += size_at + size_bytes
    last, most = False, 0
    while not last:
        header = int.from_bytes(file.read(at, 3).ljust(3, b"\xff"), "little")
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        if kind == 3:
            return (size, _CUT_OFF) if at >= file.nbytes else None
        at += 3 + (1 if kind == 1 else length)
        most += _ZSTD_BLOCK
    return (size, at + 4 * (said >> 2 & 1)) if size <= most else None


def _lz4_frame(file: ImageFile, at: int, head: bytes) -> tuple[int, int] | None:
    """As _zstd_frame()."""
    if int.from_bytes(head[:4], "little") != _LZ4 or len(head) < 15:
        return None
    said = head[4]
    block_sum, has_size, content_sum, dictionary = (said >> bit & 1 for bit in (4, 3, 2, 0))
    if said >> 6 != 1 or not has_size:
        return None
    size = int.from_bytes(head[6:14], "little")
    at += 15 + 4 * dictionary
    block, most = 1 << 8 + 2 * (head[5] >> 4 & 7), 0
    while length := int.from_bytes(file.read(at, 4).ljust(4, b"\0"), "little") & 0x7FFFFFFF:
        at += 4 + length + 4 * block_sum
        most += block
    if at + 4 > file.nbytes:
        return size, _CUT_OFF
    return (size, at + 4 + 4 * content_sum) if size <= most else None


def xz_size(file: ImageFile) -> int:
    """Bytes in an xz file by the indexes at the ends of its streams; 0 where they are not what they should be."""
    end, total, padding = file.nbytes, 0, 0
    while end >= 32:
        footer = file.read(end - 12, 12)
        if footer == bytes(12) or footer.endswith(bytes(4)):  # padding, in fours
            end, padding = end - 4, padding + 4
            if padding > _MOST_PADDING:
                return 0
            continue
        if footer[10:] != b"YZ":
            return 0
        index_bytes = 4 * (int.from_bytes(footer[4:8], "little") + 1)
        if index_bytes > min(end - 24, _MOST_INDEX):
            return 0
        numbers = _xz_numbers(file.read(end - 12 - index_bytes, index_bytes))
        packed, unpacked = numbers[0::2], numbers[1::2]
        total += sum(unpacked)
        end -= 24 + index_bytes + sum(-(-nbytes // 4) * 4 for nbytes in packed)
    return total if end == 0 and total <= file.nbytes * _MOST_RATIO else 0


def _xz_numbers(index: bytes) -> list[int]:
    """Sizes of the blocks in an index, packed and unpacked by turns; none where it is damaged."""
    numbers: list[int] = []
    value = shift = 0
    for byte in index[1:-4]:
        value |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            numbers.append(value)
            value = shift = 0
        elif shift > 63:
            return []
    count = numbers[0] if numbers else 0
    return numbers[1 : 1 + 2 * count] if index[:1] == b"\0" and 2 * count < len(numbers) else []
