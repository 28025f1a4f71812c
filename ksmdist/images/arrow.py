"""The `memory_image` v1 Arrow format: read by memory map with no copy, or from an object store by parts.

Raises ImageError: not Arrow, another table or version, columns that differ, a content that is not
one page long, an address that is not page-aligned, comes twice or out of order.
"""

from __future__ import annotations

import bisect
import functools
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Event, Lock

import numpy as np
import pyarrow as pa

from ksmdist.columns import codes, present, values
from ksmdist.errors import ImageError, ImageReadError
from ksmdist.images import ipc
from ksmdist.images.base import BATCH_BYTES, Format, Hole, Image, ImageInfo, joined_holes, joined_ranges, runs_of
from ksmdist.images.files import ImageFile, LocalFile
from ksmdist.images.headers import HINT, image_info
from ksmdist.images.joined import populate, read_rows
from ksmdist.images.stores import StoredFile
from ksmdist.tables import MEMORY_IMAGE, PAGE_FLAGS

__all__ = ["ARROW"]

_FEW_BYTES = 64 << 10  # the schema and the footer of most files are within the first and the last of this
_MOST_REGIONS = 1 << 22  # a process has 65530 mappings, unless vm.max_map_count is raised
_SMALL_READS = 32  # in flight, of about 1 KiB each: a batch's metadata is far from the next one's


class _Rows(ABC):
    """Rows of a memory_image file: checked, and those that its producer could not read as holes."""

    info: ImageInfo
    _path: str
    _starts: np.ndarray  # first row of each record batch, and the end
    holes: tuple[Hole, ...] = ()

    def _captured(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch | Hole]:
        """The batch without the rows that its producer could not read, and those as holes."""
        lost = (values(batch.column("flags")) & np.uint32(PAGE_FLAGS["unreadable"])) != 0
        if not lost.any():
            yield batch
            return
        if not lost.all():
            yield batch.filter(pa.array(~lost))
        yield from self._holes(batch, lost)

    def _holes(self, batch: pa.RecordBatch, lost: np.ndarray) -> list[Hole]:
        size = self.info.page_size
        return joined_holes(
            (values(batch.column("address"))[lost] // np.uint64(size)).astype(np.int64), size, "unreadable"
        )

    def find(self, address: np.ndarray) -> np.ndarray:
        """See Image.find: by halves to the record batch, then among its addresses."""
        found = np.full(len(address), -1, np.int64)
        firsts: dict[int, int] = {}  # first address of the batches that were asked for
        for number in sorted({self._batch_of(one, firsts) for one in address.tolist()}):
            if number < 0:
                continue
            held = self._addresses(number)
            at = np.minimum(np.searchsorted(held, address), len(held) - 1)
            here = held[at] == address
            found[here] = int(self._starts[number]) + at[here]
        return found

    def ranges(self) -> np.ndarray:
        """See Image.ranges: the addresses of all record batches are read."""
        size = np.uint64(self.info.page_size)
        found = [np.zeros((0, 2), np.uint64)]
        for number in np.flatnonzero(np.diff(self._starts)).tolist():
            held = self._addresses(number)
            found.append(joined_ranges(held, held + size))
        every = np.concatenate(found)
        return joined_ranges(every[:, 0], every[:, 1])

    def _batch_of(self, address: int, firsts: dict[int, int]) -> int:
        """The last record batch that begins at or before an address, -1 for none."""
        filled = np.flatnonzero(np.diff(self._starts)).tolist()

        def first(number: int) -> int:
            if number not in firsts:
                firsts[number] = self._last_address(int(self._starts[number]) + 1)
            return firsts[number]

        at = bisect.bisect_right(filled, address, key=first)
        return filled[at - 1] if at else -1

    @abstractmethod
    def _last_address(self, start: int) -> int:
        """Address of the row before row `start`; -1 for none."""

    @abstractmethod
    def _addresses(self, number: int) -> np.ndarray:
        """Addresses of a record batch, uint64."""

    def _check(self, batch: pa.RecordBatch, row: int, before: int) -> int:
        """Check addresses and content lengths; returns the last address. Raises ImageError."""
        size = self.info.page_size
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if name != "content":  # whose bytes are pages: what bounds them is checked below
                try:
                    column.validate(full=True)
                except pa.ArrowException as error:
                    raise ImageError(
                        f"column {name} near row {row} is damaged: {str(error).splitlines()[0]}", self._path, HINT
                    ) from None
        for name in ("address", "flags", "numa_node"):
            if batch.column(name).null_count:
                raise ImageError(f"has nulls in column {name}, near row {row}", self._path, HINT)
        if len(batch) and int(values(batch.column("numa_node")).min()) < 0:
            raise ImageError(f"has a numa_node below 0, near row {row}", self._path, HINT)
        region = codes(batch.column("region"))
        if len(region) and not -1 <= int(region.min()) <= int(region.max()) < len(self.info.regions):
            raise ImageError(f"column region near row {row} names no region", self._path, HINT)
        address = batch.column("address").to_numpy()
        wrong = np.flatnonzero(address % np.uint64(size))
        if len(wrong):
            at = int(wrong[0])
            raise ImageError(
                f"row {row + at}: address {int(address[at]):#x} is not aligned to {size}", self._path, HINT
            )
        falls = np.flatnonzero(address[1:] <= address[:-1]) + 1
        if before >= int(address[0]):
            falls = np.concatenate(([0], falls))
        if len(falls):
            at = int(falls[0])
            previous = before if at == 0 else int(address[at - 1])
            how = "comes twice" if previous == int(address[at]) else f"is out of order after {previous:#x}"
            raise ImageError(f"row {row + at}: address {int(address[at]):#x} {how}", self._path, HINT)
        content = batch.column("content")
        offsets = _offsets(content)
        length = np.diff(offsets)
        valid = present(content)
        wrong = np.flatnonzero(length != np.where(valid, size, 0))
        if len(wrong):
            at = int(wrong[0])
            raise ImageError(
                f"row {row + at} (address {int(address[at]):#x}): content of {int(length[at])} bytes, "
                f"not {size if valid[at] else 0}",
                self._path,
                HINT,
            )
        data = content.buffers()[2]
        if int(offsets[0]) < 0 or int(offsets[-1]) > (0 if data is None else data.size):
            raise ImageError(f"content near row {row} reaches past its buffer", self._path, HINT)
        return int(address[-1])


class ArrowImage(_Rows):
    """An Arrow IPC file of `memory_image` rows, memory-mapped."""

    def __init__(self, file: LocalFile, page_size: int) -> None:
        self._opened = file
        self._fd = fd = file.fd
        self._path = path = file.path
        self._mapping = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self._file = pa.py_buffer(self._mapping)
        try:
            self._reader = pa.ipc.open_file(self._file)
            schema = self._reader.schema
            _ = schema.names
            self.info = image_info(schema, file, page_size, 0)  # before columns are taken for what they should be
            rows = _rows(file)
            if len(rows) != self._reader.num_record_batches:
                raise ValueError("a footer that is read in two ways")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ImageError(f"truncated or damaged Arrow file: {str(error).splitlines()[0]}", path, HINT) from None
        self._starts = np.concatenate(([0], np.cumsum(rows, dtype=np.int64)))
        self.info = replace(self.info, pages=int(self._starts[-1]))
        if rows:  # a file's last dictionary holds the names of all its batches
            dictionary = self._batch(0).column("region").dictionary
            _check_names(dictionary, path)
            try:
                dictionary.validate(full=True)  # each name is within its buffer, and UTF-8
            except pa.ArrowException:
                raise ImageError("has names of regions that are damaged, or no UTF-8", path, HINT) from None
            self.info = replace(self.info, regions=tuple(name or "" for name in dictionary.to_pylist()))

    def close(self) -> None:
        """Let the file go."""
        del self._reader, self._file
        self._opened.close()

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """Rows [start, end): slices of the file's own batches, validated."""
        most = max(1, BATCH_BYTES // self.info.page_size)
        before = self._last_address(start)
        while start < end:
            index = int(np.searchsorted(self._starts, start, side="right")) - 1
            base = int(self._starts[index])
            count = min(end - start, int(self._starts[index + 1]) - start, most)
            batch = self._batch(index).slice(start - base, count)
            before = self._check(batch, start, before)
            for item in self._readable(batch):
                yield from (item,) if isinstance(item, Hole) else self._captured(item)
            self._forget(batch)
            start += count

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        """See Image.take."""
        for start, end in runs_of(pages):
            yield from self.batches(start, end)

    def _batch(self, index: int) -> pa.RecordBatch:
        if os.fstat(self._fd).st_size < self.info.nbytes:  # touching what is gone would be SIGBUS
            raise ImageReadError("became shorter while it was scanned", self._path, "scan a copy of it")
        try:
            batch = self._reader.get_batch(index)
            batch.validate()
            if len(batch) != self._starts[index + 1] - self._starts[index]:
                raise pa.ArrowInvalid("another number of rows than it says")
            if any(buffer.size % 4 for buffer in batch.column("content").buffers()[1:2]):
                raise pa.ArrowInvalid("offsets of another width")
        except (pa.ArrowException, OSError) as error:
            raise ImageError(
                f"record batch {index} is damaged: {str(error).splitlines()[0]}", self._path, HINT
            ) from None
        return batch

    def _last_address(self, start: int) -> int:
        if start == 0:
            return -1
        index = int(np.searchsorted(self._starts, start - 1, side="right")) - 1
        return int(self._batch(index).column("address")[start - 1 - int(self._starts[index])].as_py())

    def _addresses(self, number: int) -> np.ndarray:
        return values(self._batch(number).column("address"))

    def _span(self, batch: pa.RecordBatch) -> tuple[int, int] | None:
        """(file offset, nbytes) of the batch's contents; None where they are not a part of the file."""
        content = batch.column("content")
        data = content.buffers()[2]
        if data is None:
            return None
        offsets = _offsets(content)
        at = data.address + int(offsets[0]) - self._file.address
        if not 0 <= at <= self._file.size:
            return None  # a compressed body: Arrow has unpacked it elsewhere
        return at, int(offsets[-1] - offsets[0])

    def _readable(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch | Hole]:
        span = self._span(batch)
        if span is None or span[1] == 0 or populate(self._mapping, *span):
            yield batch
            return
        # Part of the file cannot be read (or the kernel cannot tell): read page by page, never touch the map.
        size = self.info.page_size
        rows, readable = read_rows(self._fd, span[0], span[1] // size, size)
        valid = present(batch.column("content"))
        keep = ~valid
        keep[np.flatnonzero(valid)[readable]] = True
        content = np.zeros(int(keep.sum()) + 1, np.int32)
        np.cumsum(np.where(valid[keep], size, 0), out=content[1:])
        mask = np.packbits(valid[keep], bitorder="little")
        buffers = [pa.py_buffer(mask), pa.py_buffer(content), pa.py_buffer(rows)]
        columns = [column.filter(pa.array(keep)) for column in batch.drop_columns(["content"]).columns]
        columns.insert(1, pa.BinaryArray.from_buffers(pa.binary(), int(keep.sum()), buffers))
        if keep.any():
            yield pa.RecordBatch.from_arrays(columns, schema=MEMORY_IMAGE.schema)
        yield from self._holes(batch, ~keep)

    def _forget(self, batch: pa.RecordBatch) -> None:
        """Take the pages read out of this process's resident set; they stay in the page cache."""
        span = self._span(batch)
        if span is not None and span[1]:
            aligned = span[0] - span[0] % mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, aligned, span[0] + span[1] - aligned)


@dataclass(slots=True)
class _Part:
    """Rows [start, end) of record batch `index`, read in blocks. head: all but page bytes, once they are read."""

    index: int
    start: int
    end: int
    lock: Lock = field(default_factory=Lock)
    head: tuple[ipc.Part, ipc.RowBatch, ipc.Read | None] | None = None


class StoredArrowImage(_Rows):
    """An Arrow IPC file of `memory_image` rows in an object store: of a batch only the rows asked for are read."""

    def __init__(self, file: StoredFile, page_size: int) -> None:
        self._file = file
        self._path = file.path
        try:
            self._schema = schema = self._read_schema()
            dictionaries, blocks = self._blocks()
            self.info = image_info(schema, file, page_size, 0)  # before columns are taken for what they should be
            self._batches = self._row_batches(blocks, sum(map(_buffers, MEMORY_IMAGE.schema.types)))
            self._regions = self._dictionary(dictionaries)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise ImageError(
                f"truncated or damaged Arrow file: {str(error).splitlines()[0]}", self._path, HINT
            ) from None
        self._starts = np.concatenate(([0], np.cumsum([batch.rows for batch in self._batches], dtype=np.int64)))
        _check_names(self._regions, self._path)
        names = tuple(name or "" for name in self._regions.to_pylist()) if self._batches else ()
        self.info = replace(self.info, pages=int(self._starts[-1]), regions=names)

    def close(self) -> None:
        """Let the object go."""
        self._file.close()

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """Rows [start, end), validated, a block to a batch; raises ImageError if the object changed meanwhile."""
        if start >= end:
            return
        before = self._last_address(start)
        parts = list(self._parts(start, end))
        # Unpacked, a batch is no block: one at a time.
        packed = any(self._batches[part.index].codec for part in parts)
        tasks = (functools.partial(self._read, part, *piece) for part in parts for piece in self._pieces(part))
        for batch in self._file.in_order(tasks, 1 if packed else None):
            before = self._check(batch, start, before)
            start += len(batch)
            yield from self._captured(batch)
        self._file.checked()

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        """See Image.take: several requests in flight."""
        if len(pages) == 0:
            return
        parts = [part for span in runs_of(pages) for part in self._parts(*span)]
        packed = any(self._batches[part.index].codec for part in parts)
        tasks = (functools.partial(self._read, part, 0, part.end - part.start) for part in parts)
        for part, batch in zip(parts, self._file.in_order(tasks, 1 if packed else None), strict=True):
            self._check(batch, int(self._starts[part.index]) + part.start, -1)
            yield from self._captured(batch)
        self._file.checked()

    def _parts(self, start: int, end: int) -> Iterator[_Part]:
        while start < end:
            index = int(np.searchsorted(self._starts, start, side="right")) - 1
            base, stop = int(self._starts[index]), min(end, int(self._starts[index + 1]))
            yield _Part(index, start - base, stop - base)
            start = stop

    def _pieces(self, part: _Part) -> Iterator[tuple[int, int]]:
        """First row and last, exclusive, of the blocks of a part."""
        most = self._file.block_bytes if not self._batches[part.index].codec else BATCH_BYTES
        step = max(1, most // self.info.page_size)
        for at in range(0, part.end - part.start, step):
            yield at, min(at + step, part.end - part.start)

    def _read(self, part: _Part, start: int, end: int, stop: Event) -> pa.RecordBatch:
        """Rows [start, end) of a part of a record batch."""
        read: ipc.Read = functools.partial(self._file.read_spans, stop=stop)
        batch = self._batches[part.index]
        try:
            with part.lock:  # who comes first reads the small columns for all
                if part.head is None:
                    if batch.codec:
                        batch, read = ipc.unpacked(batch, read)
                    head = ipc.part_of(batch, self._schema, self._regions, part.start, part.end, read)
                    part.head = head, batch, read if batch is not self._batches[part.index] else None
                head, batch, within = part.head
            most = (end - start) * self.info.page_size
            return ipc.with_bytes(batch, self._schema, head, start, end, most, within or read)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise ImageError(
                f"record batch {part.index} is damaged: {str(error).splitlines()[0]}", self._path, HINT
            ) from None

    def _last_address(self, start: int) -> int:
        if start == 0:
            return -1
        index = int(np.searchsorted(self._starts, start - 1, side="right")) - 1
        row = start - 1 - int(self._starts[index])
        batch = self._batches[index]
        if batch.codec:
            found = self._read(_Part(index, row, row + 1), 0, 1, Event())
            return int(found.column("address")[0].as_py())
        at = int(batch.offset[1]) + 8 * row  # after its validity, the first buffer
        return int.from_bytes(self._file.read_exactly(at, 8), "little")

    def _addresses(self, number: int) -> np.ndarray:
        batch = self._batches[number]
        read: ipc.Read = self._file.read_spans
        try:
            if batch.codec:
                batch, read = ipc.unpacked(batch, read)
            part = ipc.part_of(batch, self._schema, self._regions, 0, batch.rows, read)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise ImageError(
                f"record batch {number} is damaged: {str(error).splitlines()[0]}", self._path, HINT
            ) from None
        return values(part.columns[0])

    def _read_schema(self) -> pa.Schema:
        head = self._file.read(0, _FEW_BYTES)
        schema_at = 8
        mark, length = head[8:12], int.from_bytes(head[12:16], "little", signed=True)
        if mark == b"\xff\xff\xff\xff":
            schema_at = 16
        else:
            length = int.from_bytes(mark, "little", signed=True)
        if not 0 < length <= self._file.nbytes - schema_at:
            raise ValueError(f"a schema of {length} bytes")
        if schema_at + length > len(head):
            head += self._file.read(len(head), schema_at + length - len(head))
        if ipc.is_big_endian(head[schema_at : schema_at + length]):
            raise ValueError("its numbers are big-endian")
        return pa.ipc.read_schema(pa.py_buffer(head[8 : schema_at + length]))

    def _blocks(self) -> tuple[ipc.Blocks, ipc.Blocks]:
        tail = self._file.read(max(0, self._file.nbytes - _FEW_BYTES), _FEW_BYTES)
        at, length = ipc.footer_span(tail, self._file.nbytes)
        inside = at - (self._file.nbytes - len(tail))
        footer = tail[inside : inside + length] if inside >= 0 else self._file.read(at, length)
        return ipc.blocks_of(footer, self._file.nbytes)

    def _row_batches(self, blocks: ipc.Blocks, buffers: int) -> list[ipc.RowBatch]:
        """Their metadata; of small ones that lie together many come in one request."""
        count = len(blocks.offset)
        group = 256 if self._file.nbytes < count * _FEW_BYTES else 1

        def read(first: int, stop: Event) -> list[ipc.RowBatch]:
            some = slice(first, first + group)
            spans = list(zip(blocks.offset[some].tolist(), blocks.metadata[some].tolist(), strict=True))
            bodies = (blocks.offset + blocks.metadata)[some].tolist()
            found = self._file.read_spans(spans, stop)
            return [
                ipc.rows_of(data.to_pybytes(), at, body, buffers)
                for data, at, body in zip(found, bodies, blocks.body[some].tolist(), strict=True)
            ]

        tasks: Iterator[Callable[[Event], list[ipc.RowBatch]]]
        tasks = (functools.partial(read, first) for first in range(0, count, group))
        return [batch for some in self._file.in_order(tasks, _SMALL_READS) for batch in some]

    def _dictionary(self, blocks: ipc.Blocks) -> pa.Array:
        """The names of all regions: a file has one dictionary, and what is added to it."""
        found = [pa.array([], pa.string())]
        for batch in self._row_batches(blocks, 3):
            read: ipc.Read = self._file.read_spans
            if batch.codec:
                batch, read = ipc.unpacked(batch, read)
            found.append(ipc.dictionary_of(batch, read))
        return pa.concat_arrays(found)


def _check_names(dictionary: pa.Array, path: str) -> None:
    """Raises ImageError for more names of regions than any memory has: each is an object of this process."""
    if len(dictionary) > _MOST_REGIONS:
        raise ImageError(f"has {len(dictionary)} names of regions, more than {_MOST_REGIONS}", path, HINT)


def _rows(file: LocalFile) -> list[int]:
    """Rows of each record batch, by the metadata alone. Raises ValueError where buffers reach past their messages, or
    compressed ones unpack to more than can be: pyarrow would unpack them whole."""

    def read(spans: Sequence[tuple[int, int]]) -> list[pa.Buffer]:
        return [pa.py_buffer(file.read(at, nbytes)) for at, nbytes in spans]

    tail = file.read(max(0, file.nbytes - _FEW_BYTES), _FEW_BYTES)
    dictionaries, batches = ipc.blocks_of(file.read(*ipc.footer_span(tail, file.nbytes)), file.nbytes)
    rows: list[int] = []
    for blocks, buffers in ((dictionaries, 3), (batches, sum(map(_buffers, MEMORY_IMAGE.schema.types)))):
        rows.clear()
        for at, metadata, body in zip(
            blocks.offset.tolist(), blocks.metadata.tolist(), blocks.body.tolist(), strict=True
        ):
            batch = ipc.rows_of(file.read(at, metadata), at + metadata, body, buffers)
            if batch.codec:
                ipc.check_unpacked(batch, read)
            rows.append(batch.rows)
    return rows


def _buffers(kind: pa.DataType) -> int:
    """Buffers of a column in a file: its validity, its values, and offsets if they are binary."""
    return 3 if pa.types.is_binary(kind) else 2


def _offsets(content: pa.Array) -> np.ndarray:
    """The int32 offsets of a binary array, one more than it has values."""
    if len(content) == 0:
        return np.zeros(1, np.int32)
    return np.frombuffer(content.buffers()[1], np.int32)[content.offset : content.offset + len(content) + 1]


def _open(file: ImageFile, page_size: int) -> Image:
    if isinstance(file, LocalFile):
        return ArrowImage(file, page_size)
    if isinstance(file, StoredFile):
        return StoredArrowImage(file, page_size)
    raise ImageError(
        "is an Arrow file within a compressed one: its footer is at its end", file.path, "unpack it, and scan that"
    )


ARROW = Format("arrow", lambda head: head.startswith(b"ARROW1"), _open)
"""Arrow IPC files of the table memory_image."""
