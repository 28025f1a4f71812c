"""The `memory_image` v1 Arrow format: read by memory map with no copy, written from any image.

Raises ImageError: not Arrow, another table or version, columns that differ, a content that is not
one page long, an address that is not page-aligned, comes twice or out of order.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from weakref import finalize

import numpy as np
import pyarrow as pa

from ksmdist.columns import codes, present, values
from ksmdist.errors import ImageError, ImageReadError, SettingsError
from ksmdist.images.base import BATCH_BYTES, Format, Hole, Image, ImageInfo
from ksmdist.images.extents import FileStat, open_file, populate, read_rows
from ksmdist.tables import MEMORY_IMAGE, PAGE_FLAGS, PASSED_OVER

__all__ = ["ARROW", "write_image"]

_HINT = "`ksmdist schema memory_image` describes the format; write the image again"


class ArrowImage:
    """An Arrow IPC file of `memory_image` rows, memory-mapped."""

    def __init__(self, fd: int, stat: FileStat, path: str, page_size: int) -> None:
        self._fd = fd
        self._path = path
        self.holes: tuple[Hole, ...] = ()
        self._mapping = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self._file = pa.py_buffer(self._mapping)
        try:
            self._reader = pa.ipc.open_file(self._file)
            schema = self._reader.schema
            rows = [self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)]
        except (pa.ArrowException, OSError) as error:
            raise ImageError(f"truncated or damaged Arrow file: {str(error).splitlines()[0]}", path, _HINT) from None
        self._starts = np.concatenate(([0], np.cumsum(rows, dtype=np.int64)))
        self.info = _info(schema, path, page_size, int(self._starts[-1]), stat)
        if rows:  # a file's last dictionary holds the names of all its batches
            names = self._batch(0).column("region").dictionary.to_pylist()
            self.info = replace(self.info, regions=tuple(name or "" for name in names))
        self._close = finalize(self, os.close, fd)  # a worker's cache of images lets them go without close()

    def close(self) -> None:
        """Let the file go."""
        del self._reader, self._file
        self._close()

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

    def _captured(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch | Hole]:
        """The batch without the rows that its producer could not read, and those as holes."""
        lost = (values(batch.column("flags")) & np.uint32(PAGE_FLAGS["unreadable"])) != 0
        if not lost.any():
            yield batch
            return
        if not lost.all():
            yield batch.filter(pa.array(~lost))
        for address in batch.column("address").to_numpy()[lost].tolist():
            yield Hole(address, 1, "unreadable")

    def _batch(self, index: int) -> pa.RecordBatch:
        if os.fstat(self._fd).st_size < self.info.nbytes:  # touching what is gone would be SIGBUS
            raise ImageReadError("became shorter while it was scanned", self._path, "scan a copy of it")
        try:
            batch = self._reader.get_batch(index)
            batch.validate()
        except (pa.ArrowException, OSError) as error:
            raise ImageError(
                f"record batch {index} is damaged: {str(error).splitlines()[0]}", self._path, _HINT
            ) from None
        return batch

    def _last_address(self, start: int) -> int:
        if start == 0:
            return -1
        index = int(np.searchsorted(self._starts, start - 1, side="right")) - 1
        return int(self._batch(index).column("address")[start - 1 - int(self._starts[index])].as_py())

    def _check(self, batch: pa.RecordBatch, row: int, before: int) -> int:
        """Check addresses and content lengths; returns the last address. Raises ImageError."""
        size = self.info.page_size
        for name in ("address", "flags", "numa_node"):
            if batch.column(name).null_count:
                raise ImageError(f"has nulls in column {name}, near row {row}", self._path, _HINT)
        if len(batch) and int(values(batch.column("numa_node")).min()) < 0:
            raise ImageError(f"has a numa_node below 0, near row {row}", self._path, _HINT)
        region = codes(batch.column("region"))
        if len(region) and not -1 <= int(region.min()) <= int(region.max()) < len(self.info.regions):
            raise ImageError(f"column region near row {row} names no region", self._path, _HINT)
        address = batch.column("address").to_numpy()
        wrong = np.flatnonzero(address % np.uint64(size))
        if len(wrong):
            at = int(wrong[0])
            raise ImageError(
                f"row {row + at}: address {int(address[at]):#x} is not aligned to {size}", self._path, _HINT
            )
        falls = np.flatnonzero(address[1:] <= address[:-1]) + 1
        if before >= int(address[0]):
            falls = np.concatenate(([0], falls))
        if len(falls):
            at = int(falls[0])
            previous = before if at == 0 else int(address[at - 1])
            how = "comes twice" if previous == int(address[at]) else f"is out of order after {previous:#x}"
            raise ImageError(f"row {row + at}: address {int(address[at]):#x} {how}", self._path, _HINT)
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
                _HINT,
            )
        data = content.buffers()[2]
        if int(offsets[0]) < 0 or int(offsets[-1]) > (0 if data is None else data.size):
            raise ImageError(f"content near row {row} reaches past its buffer", self._path, _HINT)
        return int(address[-1])

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
        for address in batch.column("address").to_numpy()[~keep].tolist():
            yield Hole(address, 1, "unreadable")

    def _forget(self, batch: pa.RecordBatch) -> None:
        """Take the pages read out of this process's resident set; they stay in the page cache."""
        span = self._span(batch)
        if span is not None and span[1]:
            aligned = span[0] - span[0] % mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, aligned, span[0] + span[1] - aligned)


def _offsets(content: pa.Array) -> np.ndarray:
    """The int32 offsets of a binary array, one more than it has values."""
    if len(content) == 0:
        return np.zeros(1, np.int32)
    return np.frombuffer(content.buffers()[1], np.int32)[content.offset : content.offset + len(content) + 1]


def _info(schema: pa.Schema, path: str, page_size: int, rows: int, stat: FileStat) -> ImageInfo:
    raw = {} if schema.metadata is None else schema.metadata
    found = {key.decode("utf-8", "replace"): value.decode("utf-8", "replace") for key, value in raw.items()}
    if found.get("ksmdist.table") != MEMORY_IMAGE.name:
        raise ImageError("is an Arrow file but no memory_image (metadata ksmdist.table)", path, _HINT)
    known = {key.name: found.get(key.name, key.default) for key in MEMORY_IMAGE.keys}
    if known["ksmdist.version"] != str(MEMORY_IMAGE.version):
        raise ImageError(
            f"is memory_image version {known['ksmdist.version']}, this ksmdist reads {MEMORY_IMAGE.version}",
            path,
            "use the ksmdist that wrote it, or write it again",
        )
    wanted = {field.name: field.type for field in MEMORY_IMAGE.schema}
    given = {field.name: field.type for field in schema}
    if list(given.items()) != list(wanted.items()):
        name = next((n for n in wanted if given.get(n) != wanted[n]), ", ".join(given))
        raise ImageError(
            f"column {name} is {given.get(name, 'missing')}, memory_image has {wanted.get(name, 'other columns')}",
            path,
            _HINT,
        )
    numbers = {}
    for key in ("page_size", "pages_absent", "scan_order"):
        text = known[f"ksmdist.{key}"] or ""
        if not (text.isascii() and text.isdecimal() and len(text) < 19):
            raise ImageError(f"metadata ksmdist.{key} is {text!r}, not a number", path, _HINT)
        numbers[key] = int(text)
    if numbers["page_size"] != page_size:
        raise SettingsError(
            f"has pages of {numbers['page_size']} bytes, this run has {page_size}",
            path,
            f"run it with --page-size {numbers['page_size']}",
        )
    kind = known["ksmdist.kind"] or ""
    if kind not in ("guest", "process", "container", "kernel"):
        raise ImageError(f"metadata ksmdist.kind is {kind!r}", path, _HINT)
    caveats: tuple[str, ...] = ()
    try:
        source = json.loads(known["ksmdist.source"] or "{}")
        if source.get("filter_level"):
            caveats = (f"filtered by its producer: {source['filter_level']}",)
        caveats += tuple(str(caveat) for caveat in source.get("caveats", ()))
    except (ValueError, AttributeError, TypeError):
        raise ImageError("metadata ksmdist.source is no JSON object", path, _HINT) from None
    return ImageInfo(
        path=path,
        format="arrow",
        kind=kind,
        page_size=page_size,
        pages=rows,
        pages_absent=numbers["pages_absent"],
        nbytes=stat.nbytes,
        fingerprint=stat.fingerprint,
        image_id=known["ksmdist.image_id"] or "",
        host=known["ksmdist.host"] or "",
        tenant=known["ksmdist.tenant"] or "",
        caveats=caveats,
        scan_order=numbers["scan_order"],
        passed_over=_passed_over(known["ksmdist.passed_over"] or "[]", path),
        ksm_stat=_ksm_stat(known["ksmdist.ksm_stat"] or "{}", path),
    )


def _passed_over(text: str, path: str) -> tuple[tuple[str, str, int], ...]:
    try:
        rows = tuple((str(row["region"]), str(row["reason"]), int(row["pages"])) for row in json.loads(text))
        if all(reason in PASSED_OVER and 0 <= pages < 1 << 52 for _, reason, pages in rows):
            return rows
    except (ValueError, TypeError, KeyError):
        pass
    raise ImageError("metadata ksmdist.passed_over is not what it should be", path, _HINT)


def _ksm_stat(text: str, path: str) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((str(name), str(value)) for name, value in json.loads(text).items())
    except (ValueError, AttributeError):
        raise ImageError("metadata ksmdist.ksm_stat is no JSON object", path, _HINT) from None


def _open(path: str, page_size: int) -> ArrowImage:
    fd, stat = open_file(path)
    try:
        return ArrowImage(fd, stat, path, page_size)
    except BaseException:
        os.close(fd)
        raise


ARROW = Format("arrow", lambda head: head.startswith(b"ARROW1"), _open)
"""Arrow IPC files of the table memory_image."""


def write_image(
    sources: Sequence[Image], path: str, image_id: str, captured_at: str = "", producer: str = ""
) -> list[tuple[str, Hole]]:
    """Write images, as one, to an Arrow file at `path`; returns (source path, hole) for what was unreadable.

    The sources' addresses must not interleave: they are laid one after the other by first address.
    Unreadable pages get no row. Raises ImageError where two sources hold the same address, or where
    several name regions.
    """
    ordered = sorted(sources, key=_first_address) if len(sources) > 1 else list(sources)
    first = ordered[0].info
    if len(ordered) > 1 and any(source.info.regions for source in ordered):
        raise ImageError("names regions, so it cannot be joined with other sources", first.path, "import it by itself")
    absent = sum(source.info.pages_absent for source in sources)
    origin = {"format": first.format, "producer": producer, "filter_level": "", "caveats": list(first.caveats)}
    passed_over = [
        dict(zip(("region", "reason", "pages"), row, strict=True)) for s in ordered for row in s.info.passed_over
    ]
    metadata = {
        "ksmdist.table": MEMORY_IMAGE.name,
        "ksmdist.version": str(MEMORY_IMAGE.version),
        "ksmdist.page_size": str(first.page_size),
        "ksmdist.image_id": image_id,
        "ksmdist.kind": first.kind,
        "ksmdist.host": first.host,
        "ksmdist.tenant": first.tenant,
        "ksmdist.source": json.dumps(origin, sort_keys=True),
        "ksmdist.pages_absent": str(absent),
        "ksmdist.captured_at": captured_at,
        "ksmdist.scan_order": str(first.scan_order),
        "ksmdist.passed_over": json.dumps(passed_over),
        "ksmdist.ksm_stat": json.dumps(dict(first.ksm_stat)),
    }
    holes: list[tuple[str, Hole]] = [(source.info.path, hole) for source in ordered for hole in source.holes]
    schema = MEMORY_IMAGE.schema.with_metadata(metadata)
    before = -1
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for source in ordered:
            for item in source.batches(0, source.info.pages):
                if isinstance(item, Hole):
                    holes.append((source.info.path, item))
                    continue
                address = int(item.column("address")[0].as_py())
                if address <= before:
                    raise ImageError(
                        f"holds address {address:#x}, which another source holds or goes past",
                        source.info.path,
                        "import the sources one by one, each to an image of its own",
                    )
                before = int(item.column("address")[-1].as_py())
                writer.write_batch(item.replace_schema_metadata(metadata))
    return holes


def _first_address(image: Image) -> int:
    for item in image.batches(0, min(1, image.info.pages)):
        return item.address if isinstance(item, Hole) else int(item.column("address")[0].as_py())
    return 0
