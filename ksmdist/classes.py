"""Pages -> classes that need no other image, and one row for each content of a shard.

The order of the classes is in tables.CLASSES; which pages KSM considers at all is mm/ksm.c,
ksm_next_page_pmd_entry (6.18): present, anonymous, in a VM_MERGEABLE mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow, joined, present, values
from ksmdist.groups import group_any, group_min, group_starts, group_sum, order_by
from ksmdist.settings import Settings
from ksmdist.tables import CLASSES, KINDS, PAGE_FLAGS, REASONS, SHARD_CONTENT

__all__ = ["Classified", "classify", "combine", "digest_words", "huge_page_bytes", "last_address"]

_CLASS = {name: code for code, name in enumerate(CLASSES)}
_DECIDED_LATER = len(CLASSES)
_FILE, _SWAPPED, _NOT_MARKED, _FAULT, _BY_KSM, _VOLATILE, _HUGE_ZERO, _CANDIDATE = range(len(REASONS))


@dataclass(frozen=True, slots=True)
class Classified:
    """What is known of some pages by themselves.

    classes: int64[len(CLASSES)], pages; `duplicate` and `unique` are still 0
    kinds:   int64[len(KINDS)], pages
    regions: int64[n + 1, len(REASONS)], pages by the image's own n regions, those of none last
    colors:  int64[zero_page_colors, 2], zero pages and those of read faults by colour
    framed:  int64[2], eligible pages with bytes of their own of which it is known whether others share their frame:
             those that are not volatile, those that are
    content: `shard_content` rows, a row a page but for zero pages; combine() makes the table of them
    """

    classes: np.ndarray
    kinds: np.ndarray
    regions: np.ndarray
    colors: np.ndarray
    framed: np.ndarray
    content: pa.Table


def huge_page_bytes(page_size: int) -> int:
    """Bytes that a page of page table entries maps: a transparent huge page (PMD_SIZE), 2 MiB where pages are 4 KiB."""
    return page_size * (page_size // 8)


def classify(
    page: pa.RecordBatch,
    image: int,
    settings: Settings,
    regions: np.ndarray,
    zero_digest: bytes,
    volatile: np.ndarray | None = None,
) -> Classified:
    """A `page` batch of one image -> its pages by class, kind and region, and what they hold.

    regions: int32, the run's number of each region that the image names, which `content` has.
    zero_digest: of the zero page: those that KSM has mapped have no bytes to hash.
    volatile: bool, pages that changed since the pass before; None where there was one pass.
    Of the settings, page_size, eligible and zero_page_colors count. eligible `all`: every page that
    KSM could take were its mapping marked; never file pages or pages with neither bytes nor the zero page.
    """
    address, flags, node, frame, region, digest, word = (values(column) for column in page.columns)
    has_bytes = present(page.column("digest"))
    filled = present(page.column("fill_word"))

    def flag(*names: str) -> np.ndarray:
        return np.asarray((flags & np.uint32(sum(PAGE_FLAGS[name] for name in names))) != 0)

    zero_mapped = flag("zero_mapped") & ~has_bytes
    file = flag("file")
    could = (has_bytes | zero_mapped) & ~file
    may = could if settings.eligible == "all" else could & flag("eligible")
    by_ksm = zero_mapped & flag("pte_dirty")
    zero = filled & (word == 0)
    changed = np.zeros(len(page), bool) if volatile is None else volatile & has_bytes
    code = _first_of(
        _DECIDED_LATER,
        (~may, _CLASS["ineligible"]),
        (zero_mapped & ~by_ksm, _CLASS["zero_mapped_fault"]),
        (by_ksm, _CLASS["zero_mapped_ksm"]),
        (changed, _CLASS["volatile"]),
        (zero, _CLASS["zero"]),
    )
    classes = np.bincount(code, minlength=_DECIDED_LATER + 1)[:_DECIDED_LATER].astype(np.int64)
    kinds = np.array([zero.sum(), (filled & ~zero).sum(), (has_bytes & ~filled).sum()], np.int64)
    assert len(kinds) == len(KINDS)
    huge = zero & flag("huge") & ~flag("locked")
    reason = _first_of(
        _CANDIDATE,
        (file, _FILE),
        (~could, _SWAPPED),
        (~may, _NOT_MARKED),
        (zero_mapped & ~by_ksm, _FAULT),
        (by_ksm, _BY_KSM),
        (changed, _VOLATILE),
        (huge, _HUGE_ZERO),
    )
    row = np.where(region < 0, np.int32(len(regions)), region)
    by_region = np.bincount(row * np.int32(len(REASONS)) + reason, minlength=(len(regions) + 1) * len(REASONS))
    numbers = np.append(regions, np.int32(-1))[row]

    size = huge_page_bytes(settings.page_size)
    number = _huge_pages(address, flag("huge") & ~flag("locked") & has_bytes & may, zero & ~changed, size)
    # A page that KSM mapped to the zero page was a zero page with a frame of its own before.
    zeros = zero | (may & by_ksm)
    framed = present(page.column("frame")) & has_bytes
    block = address // np.uint64(size)
    thp = flag("huge")
    first, last, count, of_zeros = _zero_rows(zeros, may, node, number, changed, block, framed, thp)
    other = np.flatnonzero(has_bytes & ~zero)
    n = len(first)
    at, ends = np.concatenate((first, other)), np.concatenate((last, other))
    rows = _Rows(
        digest=np.concatenate((np.tile(np.frombuffer(zero_digest, np.uint8), (n, 1)), digest[other])),
        image=np.full(n + len(other), image, np.int32),
        node=node[at],
        eligible=may[at],
        huge=number[at],
        thp=np.concatenate((of_zeros, thp[other])),
        volatile=changed[at],
        pages=np.concatenate((count, np.ones(len(other), np.int64))),
        address=address[at],
        last=(address[ends] % np.uint64(size) // np.uint64(settings.page_size)).astype(np.uint16),
        region=numbers[ends],
        frame=frame[at],
        framed=framed[at],
        word=np.concatenate((np.zeros(n, np.uint64), word[other])),
        filled=np.concatenate((np.ones(n, bool), filled[other])),
    )
    colors = _colors(address, zeros & may & ~changed, zero_mapped & ~by_ksm & may, settings)
    known = may & has_bytes & (framed | flag("exclusive"))
    known_frames = np.array([(known & ~changed).sum(), (known & changed).sum()], np.int64)
    return Classified(classes, kinds, by_region.reshape(-1, len(REASONS)), colors, known_frames, rows.table())


def _first_of(default: int, *cases: tuple[np.ndarray, int]) -> np.ndarray:
    """int8[n]: the number of the first case that is true. A fifth of the time that np.select takes."""
    number = np.full(len(cases[0][0]), default, np.int8)
    for is_so, this in reversed(cases):
        number[is_so] = this
    return number


def _huge_pages(address: np.ndarray, huge: np.ndarray, zero: np.ndarray, size: int) -> np.ndarray:
    """int64[n]: numbers of the huge pages of zero pages, and of all pages of those that may have one zero page; else 0.

    The first and the last of these rows may have more pages than are here.
    """
    number = np.zeros(len(address), np.int64)
    at = np.flatnonzero(huge)
    if len(at) == 0:
        return number
    number[at] = (address[at] // np.uint64(size)).astype(np.int64) + 1
    found, zeros = np.unique(number[huge & zero], return_counts=True)
    lone = np.concatenate((found[zeros == 1], number[at[[0, -1]]]))
    number[~zero & ~np.isin(number, lone)] = 0
    return number


def _colors(address: np.ndarray, zero: np.ndarray, fault: np.ndarray, settings: Settings) -> np.ndarray:
    if settings.zero_page_colors == 1:
        return np.array([[zero.sum(), fault.sum()]], np.int64)
    color = (address // np.uint64(settings.page_size)).astype(np.int64) % settings.zero_page_colors
    counts = [np.bincount(color[which], minlength=settings.zero_page_colors) for which in (zero, fault)]
    return np.stack(counts, axis=1).astype(np.int64)


def combine(contents: Sequence[pa.Table], page_size: int) -> pa.Table:
    """`shard_content` rows -> the table: a row for each key that its definition names, sorted.

    Rows of a content of which any row has a frame stay apart, in order of address: what KSM makes
    of them depends on it. In tree.merge(), any grouping of rows by shards gives the same.
    """
    if not any(map(len, contents)):
        return SHARD_CONTENT.schema.empty_table()
    digest, image, node, may, huge, thp, volatile, pages, address, last, region, frame, word = (
        joined(contents, name) for name in SHARD_CONTENT.schema.names
    )
    framed, filled = (_present(contents, name) for name in ("frame", "fill_word"))
    rows = _Rows(
        digest, image, node, may, huge, thp, volatile, pages, address, last, region, frame, framed, word, filled
    )
    high, low = digest_words(rows.digest)
    ends = last_address(rows.address, rows.last, page_size)
    order = order_by(high, low, rows.image, rows.node, rows.eligible, rows.huge, rows.volatile, ends)
    high, low, rows = high[order], low[order], rows.take(order)
    block = ends[order] // np.uint64(huge_page_bytes(page_size))
    starts = group_starts(high, low, rows.image, rows.node, rows.eligible, rows.huge, rows.volatile, block)
    if rows.framed.any():
        of_content = group_starts(high, low)
        apart = np.repeat(group_any(rows.framed, of_content), np.diff(of_content, append=len(order)))
        apart[starts] = True
        starts = np.flatnonzero(apart)
    if len(starts) == len(order):
        return rows.table()
    ends = np.append(starts[1:], len(order)) - 1
    combined = replace(
        rows.take(starts),
        thp=group_any(rows.thp, starts),
        pages=group_sum(rows.pages, starts),
        address=group_min(rows.address, starts),
        last=rows.last[ends],
        region=rows.region[ends],
    )
    return combined.table()


def last_address(address: np.ndarray, last: np.ndarray, page_size: int) -> np.ndarray:
    """uint64[n]: addresses of the last pages of `shard_content` rows. address, last: first_address, last_page."""
    size = np.uint64(huge_page_bytes(page_size))
    return np.asarray(address - address % size + last.astype(np.uint64) * np.uint64(page_size))


def _present(contents: Sequence[pa.Table], name: str) -> np.ndarray:
    return np.concatenate([present(chunk) for table in contents for chunk in table.column(name).chunks])


def digest_words(digest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8[n, 16] digests -> their leading and trailing 64 bits, uint64[n], which sort as the bytes do."""
    words = np.ascontiguousarray(digest).view(">u8")
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The columns of `shard_content`; `framed` and `filled` say where `frame` and `word` are not null."""

    digest: np.ndarray
    image: np.ndarray
    node: np.ndarray
    eligible: np.ndarray
    huge: np.ndarray
    thp: np.ndarray
    volatile: np.ndarray
    pages: np.ndarray
    address: np.ndarray
    last: np.ndarray
    region: np.ndarray
    frame: np.ndarray
    framed: np.ndarray
    word: np.ndarray
    filled: np.ndarray

    def take(self, at: np.ndarray) -> _Rows:
        digest = self.digest.view("V16")[:, 0][at].view(np.uint8).reshape(-1, 16)
        return _Rows(
            digest,
            self.image[at],
            _taken(self.node, at),
            _taken(self.eligible, at),
            _taken(self.huge, at),
            _taken(self.thp, at),
            _taken(self.volatile, at),
            self.pages[at],
            self.address[at],
            self.last[at],
            _taken(self.region, at),
            _taken(self.frame, at),
            _taken(self.framed, at),
            self.word[at],
            self.filled[at],
        )

    def table(self) -> pa.Table:
        """The rows as `shard_content`."""
        columns = [
            self.digest,
            self.image,
            self.node,
            self.eligible,
            self.huge,
            self.thp,
            self.volatile,
            self.pages,
            self.address,
            self.last,
            self.region,
        ]
        nullable = [arrow(self.frame, null=~self.framed), arrow(self.word, null=~self.filled)]
        return pa.Table.from_arrays([*map(arrow, columns), *nullable], schema=SHARD_CONTENT.schema)


def _taken(column: np.ndarray, at: np.ndarray) -> np.ndarray:
    """column[at], for no more rows than it has; without gathering where all its values are one, as they mostly are."""
    return column[: len(at)] if len(at) and (column == column[0]).all() else column[at]


def _zero_rows(
    zero: np.ndarray,
    may: np.ndarray,
    node: np.ndarray,
    huge: np.ndarray,
    volatile: np.ndarray,
    block: np.ndarray,
    framed: np.ndarray,
    thp: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Zero pages by (node, eligible, huge page, volatile, block): first row, last row, pages, whether any is thp.

    One by one if any has a frame. block: number of the aligned frame of the size of a huge page, ascending.
    """
    at = np.flatnonzero(zero)
    if len(at) == 0 or framed[at].any():
        return at, at, np.ones(len(at), np.int64), thp[at]
    columns = [column[at] for column in (node, may, huge, volatile)]
    if any(bool((column != column[0]).any()) for column in columns):
        order = np.lexsort((at, *reversed(columns)))
        at, columns = at[order], [column[order] for column in columns]
    starts = group_starts(*columns, block[at])
    ends = np.append(starts[1:], len(at))
    return at[starts], at[ends - 1], ends - starts, group_any(thp[at], starts)
