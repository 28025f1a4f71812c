"""Pagemaps of CRIU checkpoints: where each page of a process lies, in this checkpoint or one before it.

Rules: CRIU's images/pagemap.proto, criu/pagemap.c (init_compat_pagemap_entry, read_parent_page) and criu/include/
pagemap.h. Behind two magic words come records, each behind its length in 4 bytes: first the number of the file with
the pages, then runs of pages in any order. What is present lies in pages-NUMBER.img, back to back in the order of the
records; what is in the parent has the content that it has there, in the folder `parent`, and so on. An entry without
flags is of an old CRIU: present. Where entries overlap, a page counts once, from the one that starts lowest.

Raises ImageError: no pagemap, records cut off or without what they need, addresses that are not of pages of this size
or past 2**64, a checkpoint that is its own parent, more than MOST_PARENTS of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Self

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.files import ImageFile, LocalFile
from ksmdist.images.protobuf_messages import numbers_of, records_of
from ksmdist.images.segments import Segments, overlaps, uncovered
from ksmdist.images.siblings import open_sibling, read_whole
from ksmdist.images.stores import StoredFile

__all__ = ["MISSING", "MOST_PARENTS", "PAGEMAP", "TRUNCATED", "CheckpointPages", "PlacedRuns", "read_pages"]

PAGEMAP = bytes.fromhex("1943565425400856")
"""First bytes of a pagemap: IMG_COMMON_MAGIC and PAGEMAP_MAGIC of criu/include/magic.h."""

MOST_PARENTS = 64
"""Checkpoints in a chain, each of them the parent of the one before."""

MISSING, TRUNCATED = -1, -2
"""PlacedRuns.source of pages whose file is not there, or that are past the end of it."""

_IN_PARENT, _HERE = -3, -4  # sources while a pagemap is read
_PE_PARENT, _PE_PRESENT = np.uint64(1), np.uint64(4)
_MOST_BYTES = 256 << 20  # of a pagemap: ten million entries
_MOST_RECORD = 256  # bytes of an entry: those known have 40 at most
_MOST_PAGES = 2.0**52  # of an address space
_HINT = "take the checkpoint again, or check that it was copied whole"


@dataclass(frozen=True, slots=True)
class PlacedRuns:
    """Runs of pages [first, last), int64[n], ascending and disjoint, and where each lies.

    source: int32[n], places in a list of files, or MISSING, TRUNCATED; place: int64[n], pages before it in the file.
    """

    first: np.ndarray
    last: np.ndarray
    source: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, first: np.ndarray, last: np.ndarray, source: np.ndarray | int, place: np.ndarray | None = None) -> Self:
        """From runs in any order, of which none is empty: what an earlier one covers, later ones lose."""
        source = np.full(len(first), source, np.int32) if isinstance(source, int) else source
        place = np.zeros(len(first), np.int64) if place is None else place
        order = np.argsort(first, kind="stable")
        first, last, source, place = first[order], last[order], source[order], place[order]
        if len(first) == 0:
            return cls(first, last, source, place)
        cut = np.maximum(first, np.concatenate((first[:1], np.maximum.accumulate(last)[:-1])))
        keep = cut < last
        return cls(cut[keep], last[keep], source[keep], (place + cut - first)[keep])

    def some(self, which: np.ndarray) -> PlacedRuns:
        """Those of the runs, bool[n] or int64[m] ascending."""
        return PlacedRuns(self.first[which], self.last[which], self.source[which], self.place[which])

    def cut(self, first: np.ndarray, last: np.ndarray) -> tuple[PlacedRuns, np.ndarray]:
        """The parts that lie in ascending, disjoint ranges of pages, int64[m]; and in which of these, int64."""
        here, there = overlaps(self.first, self.last, first, last)
        low = np.maximum(self.first[here], first[there])
        high = np.minimum(self.last[here], last[there])
        return PlacedRuns(low, high, self.source[here], self.place[here] + low - self.first[here]), there

    def outside(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Runs of pages that lie in none of these ranges, int64[n, 2]."""
        whole, part = (
            Segments(low.astype(np.uint64), high.astype(np.uint64), low)
            for low, high in ((self.first, self.last), (first, last))
        )
        return np.array(uncovered(whole, part), np.int64).reshape(-1, 2)

    @property
    def pages(self) -> int:
        """Pages of all runs."""
        return int((self.last - self.first).sum())


@dataclass(frozen=True, slots=True)
class CheckpointPages:
    """The pages of a pagemap, and what was read to find them.

    files: those with pages, open; parts: of the parents' pagemaps, as (path, fingerprint); nbytes: of these;
    behind: pages in the checkpoint's own file with pages that no entry names.
    """

    runs: PlacedRuns
    files: list[LocalFile | StoredFile]
    parts: list[tuple[str, str]]
    nbytes: int
    behind: int


def read_pages(file: ImageFile, name: str, page_size: int, opened: ExitStack) -> CheckpointPages:
    """The pages of a pagemap, through all its parents.

    name: of the pagemap, in each of the folders; "" if it is not known. opened: closes the files with pages, unless
    the image takes them over.
    """
    levels: list[PlacedRuns] = []
    files: list[LocalFile | StoredFile] = []
    parts: list[tuple[str, str]] = []
    nbytes = behind = 0
    for depth, pagemap in enumerate(_chain(file, name, levels)):
        if depth:
            parts.append((pagemap.path, pagemap.fingerprint))
            nbytes += pagemap.disk_nbytes
        pages_id, runs, present = _entries(pagemap, page_size)
        pages = open_sibling(pagemap, f"pages-{pages_id}.img") if present or not depth else None
        if pages is None:
            lost = np.where(runs.source == _HERE, np.int32(MISSING), runs.source)
            runs = PlacedRuns(runs.first, runs.last, lost, runs.place)
        else:
            opened.callback(pages.close)
            runs = _located(runs, pages.nbytes // page_size, len(files))
            behind = behind if depth else max(0, pages.nbytes // page_size - present)
            files.append(pages)
        levels.append(runs)
    none = np.zeros(0, np.int64)
    runs = PlacedRuns.of(none, none, MISSING)
    for level in reversed(levels):
        runs = _laid_over(level, runs)
    return CheckpointPages(runs, files, parts, nbytes, behind)


def _chain(file: ImageFile, name: str, levels: list[PlacedRuns]) -> Iterator[ImageFile]:
    """The pagemap, then its parent's and so on, as long as the last of `levels` has pages there."""
    seen = {file.fingerprint}
    yield file
    last: ImageFile = file
    while name and (levels[-1].source == _IN_PARENT).any():
        if len(levels) > MOST_PARENTS:
            raise ImageError(f"has more than {MOST_PARENTS} parents", file.path, "take a checkpoint without a parent")
        pagemap = open_sibling(last, f"parent/{name}")
        if pagemap is None:
            return
        last = pagemap
        with closing(pagemap):
            if isinstance(pagemap, LocalFile) and pagemap.fingerprint in seen:  # which has its inode
                raise ImageError("has a checkpoint that is its own parent", file.path, "mend the link named parent")
            seen.add(pagemap.fingerprint)
            yield pagemap


def _entries(file: ImageFile, page_size: int) -> tuple[int, PlacedRuns, int]:
    """A pagemap: the number of its file with pages; its entries, which are in the parent, here or missing; pages that
    the file should have. Measured: 1 us an entry."""
    path = file.path
    data = read_whole(file, _MOST_BYTES)
    if not data.startswith(PAGEMAP):
        raise ImageError("is no pagemap of CRIU", path, "check that it is whole, and of CRIU 1.3 or later")
    try:
        start, end = records_of(data, len(PAGEMAP))
        if len(start) == 0:
            raise ValueError("has no record")
        found = numbers_of(np.frombuffer(data, np.uint8), start, end, range(1, 6), _MOST_RECORD)
    except ValueError as error:
        raise ImageError(str(error), path, _HINT) from None
    pages_id, has_id = int(found[1][0][0]), bool(found[1][1][0])
    value = {number: column[1:] for number, (column, _) in found.items()}
    there = {number: column[1:] for number, (_, column) in found.items()}
    count = np.where(there[5], value[5], value[2])  # 64 bits wide since 2025
    if not has_id or not (there[1] & (there[2] | there[5])).all():
        raise ImageError("has a record without what it must have", path, _HINT)
    size = np.uint64(page_size)
    if bool((value[1] % size != 0).any()):
        raise ImageError(
            f"has addresses that are not of {page_size}-byte pages", path, "give the --page-size of where it was taken"
        )
    past = count > (np.uint64(2**64 - 1) - value[1]) // size
    if bool(past.any()) or float(count.astype(np.float64).sum()) > _MOST_PAGES:
        raise ImageError("has entries that reach past the end of the address space", path, _HINT)
    in_parent = (value[3] != 0) | ((value[4] & _PE_PARENT) != 0)
    here = np.where(there[4], (value[4] & _PE_PRESENT) != 0, value[3] == 0)
    first, length = (value[1] // size).astype(np.int64), count.astype(np.int64)
    in_file = np.where(here, length, 0)
    source = np.where(in_parent, _IN_PARENT, np.where(here, _HERE, MISSING)).astype(np.int32)
    some = length > 0
    place = np.cumsum(in_file) - in_file
    runs = PlacedRuns.of(first[some], (first + length)[some], source[some], place[some])
    return pages_id, runs, int(in_file.sum())


def _located(runs: PlacedRuns, pages: int, number: int) -> PlacedRuns:
    """The runs, those that are here in file `number`, which has so many pages; those behind its end are truncated."""
    here = runs.source == _HERE
    end = np.where(here, np.minimum(runs.last, runs.first + np.maximum(pages - runs.place, 0)), runs.last)
    some, cut = runs.first < end, end < runs.last
    source = np.where(here, np.int32(number), runs.source)
    return PlacedRuns.of(
        np.concatenate((runs.first[some], end[cut])),
        np.concatenate((end[some], runs.last[cut])),
        np.concatenate((source[some], np.full(int(cut.sum()), TRUNCATED, np.int32))),
        np.concatenate((runs.place[some], np.zeros(int(cut.sum()), np.int64))),
    )


def _laid_over(runs: PlacedRuns, parent: PlacedRuns) -> PlacedRuns:
    """The runs, with what is in the parent found there, or missing."""
    wanted = runs.some(runs.source == _IN_PARENT)
    own = runs.some(runs.source != _IN_PARENT)
    found, _ = parent.cut(wanted.first, wanted.last)
    gaps = wanted.outside(found.first, found.last)
    lost = PlacedRuns.of(gaps[:, 0], gaps[:, 1], MISSING)
    parts = own, found, lost
    return PlacedRuns.of(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("first", "last", "source", "place"))
    )
