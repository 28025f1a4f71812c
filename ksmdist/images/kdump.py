"""kdump-compressed dumps: makedumpfile's, QEMU's (`dump-guest-memory -z`), split ones, old diskdumps.

A page that is not in one was left out, and is absent; it was zero only where the dump level is 1 and the producer
does not keep zero pages as pages. makedumpfile and QEMU keep them: all are one page in the file.
Every piece of a split dump has the bitmaps of the whole, and the pages of its own range (makedumpfile --split).

Raises ImageError: headers that make no sense, a file that ends in its bitmaps, pieces that are not of one dump.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from threading import Event

import numpy as np
import pyarrow as pa

from ksmdist.errors import ImageError, ImageReadError
from ksmdist.images.base import NEVER_TOUCHED, Format, Hole, Image, ImageInfo, page_batch, runs_of
from ksmdist.images.bitmaps import PageBitmap
from ksmdist.images.extents import content_array
from ksmdist.images.files import ImageFile, LocalFile, open_file
from ksmdist.images.folders import Entry, Folders, folders_of
from ksmdist.images.kdump_header import (
    DESCRIPTOR_BYTES,
    MAGICS,
    KdumpHeader,
    check_page_size,
    holds,
    read_bitmaps,
    read_header,
)
from ksmdist.images.kdump_pages import REASONS, KdumpPiece
from ksmdist.images.roots import is_inside
from ksmdist.images.uris import local_path

__all__ = ["KDUMP", "KdumpImage"]

_BATCH_BYTES = 8 << 20  # unpacked: what is unpacked is hashed while it is in the cache
_MISSING = REASONS.index("missing")
_TRUNCATED = REASONS.index("truncated")

_LEVELS = ((1, "zero"), (2 | 4, "cache"), (4, "cache private"), (8, "user"), (16, "free"))
"""makedumpfile(8), -d: what each bit of a dump level leaves out."""


class KdumpImage:
    """A kdump. pieces: by the pages they hold; dumped: pages that have a descriptor, in one of them or in one that is
    not there; present: these, and pages that are known to be zero; known: from this page on a descriptor is not known.
    """

    def __init__(
        self, info: ImageInfo, pieces: Sequence[KdumpPiece], present: PageBitmap, dumped: PageBitmap, known: int
    ) -> None:
        self.info = info
        self.holes: tuple[Hole, ...] = ()
        self._pieces = pieces
        self._present, self._dumped = present, dumped
        self._first = np.array([piece.first for piece in pieces], np.int64)
        self._end = np.array([piece.first + piece.count for piece in pieces], np.int64)
        self._known = known
        self._stored = [piece.stored for piece in pieces]

    def close(self) -> None:
        """Let the files go."""
        for piece in self._pieces:
            piece.file.close()

    def ranges(self) -> np.ndarray:
        """See Image.ranges."""
        return self._present.ranges() * np.uint64(self.info.page_size)

    def find(self, address: np.ndarray) -> np.ndarray:
        """See Image.find."""
        page = (address // np.uint64(self.info.page_size)).astype(np.int64)
        return np.where(self._present.has(page), self._present.rank(page), -1)

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """Pages [start, end) by address, unpacked; from a store several reads in flight."""
        most = self._most
        yield from self._read(np.arange(at, min(at + most, end)) for at in range(start, end, most))

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        """See Image.take."""
        yield from self._read(pages[at : at + self._most] for at in range(0, len(pages), self._most))

    @property
    def _most(self) -> int:
        return max(1, _BATCH_BYTES // self.info.page_size)

    def _read(self, blocks: Iterator[np.ndarray]) -> Iterator[pa.RecordBatch | Hole]:
        stored = [file for file in self._stored if file is not None]
        if len(stored) < len(self._stored):
            for block in blocks:
                yield from self._block(block, None)
            for piece in self._pieces:
                piece.file.checked()
            return
        for found in stored[0].in_order(functools.partial(self._block, block) for block in blocks):
            yield from found
        for file in stored:
            file.checked()

    def _block(self, numbers: np.ndarray, stop: Event | None) -> list[pa.RecordBatch | Hole]:
        """Some pages, ascending numbers of them: a batch, and what is not in it."""
        size = self.info.page_size
        page = self._present.pages(numbers)
        dumped = np.ones(len(page), bool) if self._present is self._dumped else self._dumped.has(page)
        rank = self._dumped.rank(page)
        of = np.searchsorted(self._first, rank, side="right") - 1
        of[(of >= 0) & (rank >= self._end[of])] = -1
        of[~dumped] = len(self._pieces)
        reason = np.where(of < 0, _MISSING, 0).astype(np.uint8)
        parts: list[bytes | memoryview] = []
        cuts = np.flatnonzero(np.diff(of)) + 1
        for low, high in zip([0, *cuts.tolist()], [*cuts.tolist(), len(of)], strict=True):
            piece = int(of[low])
            if piece == len(self._pieces):
                parts.append(bytes((high - low) * size))
            elif piece >= 0:
                some, reason[low:high] = self._of_piece(piece, page[low:high], rank[low:high], stop)
                parts += some
        keep = reason == 0
        found: list[pa.RecordBatch | Hole] = []
        if keep.any():
            data = pa.py_buffer(parts[0]) if len(parts) == 1 else pa.py_buffer(b"".join(parts))
            found.append(page_batch(page[keep], content_array(data, int(keep.sum()), size), size))
        for why in np.unique(reason[~keep]).tolist():
            for start, end in runs_of(page[reason == why]):
                found.append(Hole(start * size, end - start, REASONS[why]))
        return found

    def _of_piece(
        self, piece: int, page: np.ndarray, rank: np.ndarray, stop: Event | None
    ) -> tuple[list[bytes | memoryview], np.ndarray]:
        known = int(np.searchsorted(page, self._known))
        reason = np.full(len(page), _TRUNCATED, np.uint8)
        parts: list[bytes | memoryview] = []
        if known:
            parts, reason[:known] = self._pieces[piece].read(rank[:known], stop)
        return parts, reason


def _open(file: ImageFile, page_size: int) -> Image:
    header = read_header(file)
    check_page_size(header, page_size)
    with ExitStack() as opened:  # closes what was opened beside it, unless the image takes it over
        files = [(file, header)]
        if header.split is not None:
            files = _whole(file, header)
            for other, _ in files:
                if other is not file:
                    opened.callback(other.close)
        memory, dumped, known = read_bitmaps(*files[0])
        for other, other_header in files[1:]:
            others = read_bitmaps(other, other_header)
            if others[:2] != (memory, dumped):
                raise ImageError(
                    f"and {files[0][0].path} are pieces of different dumps",
                    other.path,
                    "keep each dump in its own folder",
                )
            known = min(known, others[2])
        pieces = _pieces(files, dumped, known)
        absent = len(memory.joined(dumped)) - len(dumped)
        # Where it is not known how many were dumped, it is not known where their pages begin.
        shared = {_shares_zeros(piece, len(dumped)) for piece in pieces} if absent and known >= dumped.end else set()
        present = dumped
        if header.dump_level == 1 and shared & {True, False} == {False}:
            present, absent = memory.joined(dumped), 0
        if not len(present):
            raise ImageError("is a kdump with no pages in it", file.path, "take the dump again, with a lower -d")
        image = KdumpImage(
            _info(files, header, present, len(dumped), absent, True in shared, _of_other_pieces(pieces, dumped)),
            pieces,
            present,
            dumped,
            known,
        )
        if all(other is not file for other, _ in files):  # it was given by another name
            file.close()
        opened.pop_all()
        return image


def _info(
    files: Sequence[tuple[ImageFile, KdumpHeader]],
    header: KdumpHeader,
    present: PageBitmap,
    dumped: int,
    absent: int,
    shared: bool,
    missing: int,
) -> ImageInfo:
    caveats = [NEVER_TOUCHED] if header.producer == "QEMU" else []
    if header.dump_level == 1 and not absent and len(present) > dumped:
        caveats.append("its zero pages were left out, and are counted as zero pages: level 1 leaves out no others")
    if missing:
        caveats.append(f"{missing:,} of its pages are in pieces of the split dump that are not beside it")
    if header.incomplete:
        caveats.append("makedumpfile had no space for all of it")
    if header.erased:
        caveats.append("data in it was overwritten by its producer (makedumpfile --config or --eppic)")
    level = header.dump_level
    excluded = absent if level & ~1 or header.diskdump or header.excluded_vmemmap else 0
    info = ImageInfo.of(
        files[0][0],
        "kdump",
        "guest",  # or the host's own kernel: nothing in a kdump tells
        header.block_size,
        len(present),
        absent,
        caveats=tuple(caveats),
        producer=header.producer,
        filter_level=_filter_level(header, shared) if excluded else "",
        pages_excluded=excluded,
        parts=tuple((file.path, file.fingerprint) for file, _ in files[1:]),
    )
    return replace(info, nbytes=sum(file.disk_nbytes for file, _ in files))


def _filter_level(header: KdumpHeader, shared: bool) -> str:
    """What a dump level left out, for people: not zero pages, where they are kept, sharing one."""
    level = header.dump_level
    if level < 0:
        return "pages were left out, and the dump does not say which"
    kinds = [name for bits, name in _LEVELS if level & bits and not (name == "zero" and shared)]
    if header.excluded_vmemmap:
        kinds.append("unused vmemmap")
    listed = " and ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1]))) if kinds else "some"
    return f"{header.producer or 'dump level'} -d {level}: {listed} pages were left out".replace("level -d", "level")


def _shares_zeros(piece: KdumpPiece, dumped: int) -> bool | None:
    """Whether a producer stores zero pages, as one page that all of them share, before all others; None: cut off.

    makedumpfile puts it after room for the descriptors of all pieces (write_kdump_pages_and_bitmap_cyclic).
    """
    size, at = piece.header.block_size, piece.header.descriptors_at + DESCRIPTOR_BYTES * dumped
    if not holds(piece.file, np.array([at], np.int64), size)[0]:
        return None
    return piece.file.read(at, size) == bytes(size)


def _pieces(files: Sequence[tuple[ImageFile, KdumpHeader]], dumped: PageBitmap, known: int) -> list[KdumpPiece]:
    found: list[KdumpPiece] = []
    end = 0
    for file, header in files:
        start, stop = header.split or (0, dumped.end)
        if start < end:
            raise ImageError(
                f"holds pages of the split dump that {found[-1].file.path} holds, too",
                file.path,
                "keep one copy of each piece in the folder",
            )
        first, last, sure = dumped.rank(np.array([start, stop, max(start, min(stop, known))], np.int64)).tolist()
        found.append(KdumpPiece(file, header, first, last - first, sure - first))
        end = max(end, stop)
    return found


def _of_other_pieces(pieces: Sequence[KdumpPiece], dumped: PageBitmap) -> int:
    """Pages that were dumped to pieces of which none is here."""
    return len(dumped) - sum(piece.count for piece in pieces)


def _whole(file: ImageFile, header: KdumpHeader) -> list[tuple[ImageFile, KdumpHeader]]:
    """The pieces of a split dump that are in the folder of one, by the pages they hold; all but `file` newly open.

    A file that has several names is one piece, by the name that is no link: `file` is left out where that is another.
    """
    folders = folders_of(file.path)
    folder, _, name = folders.path.rpartition("/")
    if not folder and folders.path.startswith("/"):
        folder = "/"
    entries = [entry for entry in folders.list(folder) if entry.nbytes > header.block_size]
    local = local_path(file.path) is not None
    if local:  # links out of the folder are not followed: pages of a piece behind one are missing
        own = os.path.realpath(folder or ".")
        entries = [entry for entry in entries if entry.name == name or is_inside(os.path.realpath(entry.path), own)]
    found: list[tuple[ImageFile, KdumpHeader]] = []
    with ExitStack() as opened:
        for entry in sorted(
            _kdumps(folders, entries), key=lambda entry: (local and os.path.islink(entry.path), entry.path)
        ):
            other: ImageFile = file if entry.name == name else open_file(folders.uri(entry.path))
            if other is not file:
                opened.callback(other.close)
            its = None if _is_among(other, found) else _piece_header(other, header)
            if its is not None:
                found.append((other, its))
            elif other is not file:
                other.close()
        if not _is_among(file, found):  # it is packed, and so has no magic
            found.append((file, header))
        opened.pop_all()
    return sorted(found, key=lambda piece: (piece[1].split, piece[0].path))


def _is_among(file: ImageFile, found: Sequence[tuple[ImageFile, KdumpHeader]]) -> bool:
    """Whether a file is there already; by another name it may be a local one."""
    local = [other.fingerprint for other, _ in found if isinstance(other, LocalFile)]
    return any(file is other for other, _ in found) or (isinstance(file, LocalFile) and file.fingerprint in local)


def _piece_header(file: ImageFile, header: KdumpHeader) -> KdumpHeader | None:
    """The header of a file that is a piece of the dump that `header` is of; None if it is none."""
    start = header.main[0]
    if file.read(0, len(start)) != start:
        return None
    its = read_header(file)
    return its if its.split is not None and its.main == header.main else None


def _kdumps(folders: Folders, entries: Sequence[Entry]) -> list[Entry]:
    """Those of the files that start like a kdump; what cannot be read is none."""
    try:
        heads = list(folders.heads(entries))
    except ImageReadError:
        heads = []
        for entry in entries:
            try:
                heads += folders.heads([entry])
            except ImageReadError:
                heads.append(b"")
    return [entry for entry, head in zip(entries, heads, strict=True) if head.startswith(MAGICS)]


KDUMP = Format("kdump", lambda head: head.startswith(MAGICS), _open)
"""kdump-compressed dumps, of 64-bit kernels, of either byte order."""
