"""Parts of an Arrow IPC file: where its record batches and their columns lie, and some rows of one.

pyarrow reads a record batch whole, or not at all; a shard of an image in an object store needs some rows of
it. Format: Arrow's Columnar.rst (IPC File Format) and format/{File,Message}.fbs, read by hand: flatbuffers
are tables of offsets. Raises ValueError for what is damaged.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

__all__ = [
    "MOST_UNPACKED",
    "Blocks",
    "Part",
    "Read",
    "RowBatch",
    "blocks_of",
    "check_unpacked",
    "dictionary_of",
    "footer_span",
    "is_big_endian",
    "part_of",
    "rows_of",
    "unpacked",
    "with_bytes",
]

Read = Callable[[Sequence[tuple[int, int]]], list[pa.Buffer]]
"""Reads (file offset, nbytes) each."""

MOST_UNPACKED = (1 << 31) + (1 << 28)
"""Most bytes of a compressed record batch once unpacked: 2 GiB in its binary column, which has offsets of 32 bits."""

MAGIC = b"ARROW1"
_MOST_FOOTER = 1 << 28  # ten million batches
_MOST_METADATA = 1 << 20  # of a message: a record batch of this table has less than 1 KiB
_SCHEMA, _DICTIONARY, _RECORD_BATCH = 1, 2, 3
_CODECS = {0: "lz4", 1: "zstd"}
_BLOCK = np.dtype({"names": ["offset", "metadata", "body"], "formats": ["<i8", "<i4", "<i8"], "offsets": [0, 8, 16]})


class _Table:
    """A flatbuffers table at `at` of `data`."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._vtable = at - self._int("<i", at)

    def _int(self, format: str, at: int) -> int:
        if at < 0:
            raise ValueError("an offset before the start")
        try:
            return int(struct.unpack_from(format, self._data, at)[0])
        except struct.error:
            raise ValueError("an offset past the end") from None

    def _field(self, number: int) -> int:
        """Where the field is; 0 if it has its default."""
        if 4 + 2 * number >= self._int("<H", self._vtable):
            return 0
        offset = self._int("<H", self._vtable + 4 + 2 * number)
        return self._at + offset if offset else 0

    def number(self, field: int, format: str, default: int = 0) -> int:
        """A number."""
        at = self._field(field)
        return self._int(format, at) if at else default

    def table(self, field: int) -> _Table | None:
        """A table within; None where it is not there."""
        at = self._field(field)
        return _Table(self._data, at + self._int("<I", at)) if at else None

    def structs(self, field: int, dtype: np.dtype[np.void]) -> np.ndarray:
        """A vector of structs."""
        at = self._field(field)
        if not at:
            return np.zeros(0, dtype)
        at += self._int("<I", at)
        count = self._int("<I", at)
        if at + 4 + count * dtype.itemsize > len(self._data):
            raise ValueError("a vector past the end")
        return np.frombuffer(self._data, dtype, count, at + 4)


def _root(data: bytes) -> _Table:
    return _Table(data, struct.unpack_from("<I", data)[0] if len(data) >= 4 else -1)


def is_big_endian(schema: bytes) -> bool:
    """Whether a schema message's metadata says so."""
    header = _root(schema).table(2)
    return header is not None and header.number(0, "<h") == 1


@dataclass(frozen=True, slots=True)
class Blocks:
    """Messages of a file, as its footer lists them: int64[n] file offset, bytes of metadata, bytes of body."""

    offset: np.ndarray
    metadata: np.ndarray
    body: np.ndarray


def footer_span(tail: bytes, nbytes: int) -> tuple[int, int]:
    """(file offset, nbytes) of the footer. tail: the last 10 bytes of the file or more; nbytes: of the file."""
    if len(tail) < 10 or tail[-6:] != MAGIC:
        raise ValueError("no Arrow footer at its end")
    length = struct.unpack("<i", tail[-10:-6])[0]
    if not 0 < length <= min(nbytes - 18, _MOST_FOOTER):
        raise ValueError(f"a footer of {length} bytes")
    return nbytes - 10 - length, length


def blocks_of(footer: bytes, nbytes: int) -> tuple[Blocks, Blocks]:
    """Dictionaries and record batches of a file of `nbytes` bytes."""
    root = _root(footer)
    found = []
    for field in (2, 3):
        table = root.structs(field, _BLOCK)
        blocks = Blocks(*(table[name].astype(np.int64) for name in ("offset", "metadata", "body")))
        inside = (blocks.offset >= 8) & (blocks.metadata >= 8) & (blocks.body >= 0)
        inside &= (blocks.offset <= nbytes) & (blocks.body <= nbytes)
        if not (inside & (blocks.offset + blocks.metadata + blocks.body <= nbytes)).all():
            raise ValueError("a message past the end of the file")
        if (blocks.metadata > _MOST_METADATA).any():
            raise ValueError("a message of more metadata than any needs")
        if float((blocks.metadata + blocks.body).sum(dtype=np.float64)) > nbytes:  # one that is listed over and over
            raise ValueError("messages of more bytes than the file")
        found.append(blocks)
    return found[0], found[1]


@dataclass(frozen=True, slots=True)
class RowBatch:
    """A record batch in the file: its rows, and for each buffer where it is. codec: "" if not compressed.

    nulls: int64[columns]; offset, length: int64[buffers], in the file, bytes
    """

    rows: int
    nulls: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    codec: str

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return int(self.length.sum())


def rows_of(metadata: bytes, body_at: int, body: int, buffers: int) -> RowBatch:
    """A record batch or dictionary from its message's metadata. body_at, body: of its body in the file, bytes.

    buffers: how many it must have.
    """
    # A continuation mark and the length come first; files from before 2019 have no mark.
    message = _root(metadata[8 if metadata[:4] == b"\xff\xff\xff\xff" else 4 :])
    kind, header = message.number(1, "<B"), message.table(2)
    if header is not None and kind == _DICTIONARY:
        header = header.table(1)
    if header is None or kind not in (_DICTIONARY, _RECORD_BATCH):
        raise ValueError("a message that is no record batch")
    pair = np.dtype("<i8,<i8")
    nodes, found = header.structs(1, pair), header.structs(2, pair)
    offset, length = found["f0"].astype(np.int64), found["f1"].astype(np.int64)
    rows = header.number(0, "<q")
    if len(found) != buffers or not 0 <= rows < 1 << 40 or (nodes["f0"] != rows).any():
        raise ValueError("a record batch of other columns")
    if ((offset < 0) | (length < 0) | (offset > body) | (length > body - offset)).any():
        raise ValueError("a buffer past the end of its message")
    codec, compression = "", header.table(3)
    if compression is not None:
        codec = _CODECS.get(compression.number(0, "<b"), "")
        if not codec or compression.number(1, "<b"):
            raise ValueError("an unknown compression")
    return RowBatch(rows, nodes["f1"].astype(np.int64), offset + body_at, length, codec)


def check_unpacked(batch: RowBatch, read: Read) -> None:
    """Raises ValueError where the buffers of a compressed batch say that they unpack to more than MOST_UNPACKED.

    Each begins with the bytes it unpacks to, or -1 for one that is not packed (format/Message.fbs, BodyCompression).
    """
    long = batch.length >= 8
    packed = read([(at, 8) for at in batch.offset[long].tolist()])
    _check_sizes([struct.unpack("<q", data)[0] for data in packed])


def _check_sizes(sizes: Sequence[int]) -> None:
    if min(sizes, default=0) < -1 or sum(sizes) > MOST_UNPACKED:
        raise ValueError("compressed buffers of no size that can be")


def unpacked(batch: RowBatch, read: Read) -> tuple[RowBatch, Read]:
    """A compressed batch read whole: the same, not compressed, and what reads from it in memory."""
    found = read(list(zip(batch.offset.tolist(), batch.length.tolist(), strict=True)))
    parts: list[pa.Buffer] = []
    sizes = [struct.unpack("<q", data[:8])[0] if data.size >= 8 else 0 for data in found]
    _check_sizes(sizes)
    for data, size in zip(found, sizes, strict=True):
        body = data.slice(8) if data.size >= 8 else data
        parts.append(body if size == -1 or not body.size else _decompressed(body, size, batch.codec))
    length = np.array([part.size for part in parts], np.int64)
    offset = np.cumsum(length) - length

    def within(spans: Sequence[tuple[int, int]]) -> list[pa.Buffer]:
        starts = np.searchsorted(offset, [at for at, _ in spans], side="right") - 1
        return [
            parts[part].slice(at - int(offset[part]), nbytes) if nbytes else pa.py_buffer(b"")
            for part, (at, nbytes) in zip(starts.tolist(), spans, strict=True)
        ]

    return RowBatch(batch.rows, batch.nulls, offset, length, ""), within


def _decompressed(body: pa.Buffer, size: int, codec: str) -> pa.Buffer:
    """What a buffer unpacks to. Not pa.decompress(): where that is less than `size`, it has what the memory had before
    at its end, and says nothing. Raises ValueError, OSError."""
    with pa.CompressedInputStream(pa.BufferReader(body), codec) as stream:
        data = stream.read_buffer(size + 1)
    if data.size != size:
        raise ValueError(f"a compressed buffer does not unpack to the {size} bytes that it says")
    return data


def dictionary_of(batch: RowBatch, read: Read) -> pa.Array:
    """The strings of a dictionary batch."""
    spans = list(zip(batch.offset.tolist(), batch.length.tolist(), strict=True))
    validity, offsets, data = read(spans)
    array = pa.StringArray.from_buffers(batch.rows, offsets, data, validity if validity.size else None)
    array.validate(full=True)
    return array


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a batch, without the bytes of its binary column, whose place among the columns is None.

    offsets: int64[rows + 1] of those bytes in their buffer, the one numbered `buffer`; valid: bool[rows] or None
    """

    columns: list[pa.Array | None]
    offsets: np.ndarray
    valid: np.ndarray | None
    buffer: int

    def __len__(self) -> int:
        return len(self.offsets) - 1


def part_of(batch: RowBatch, schema: pa.Schema, dictionary: pa.Array, start: int, end: int, read: Read) -> Part:
    """Rows [start, end) of a batch that is not compressed, with one binary column and others of fixed width.

    dictionary: of its dictionary column
    """
    n = end - start
    if not 0 <= start < end <= batch.rows:
        raise ValueError("rows past the end of a record batch")
    if len(batch.nulls) != len(schema):
        raise ValueError("a record batch of other columns")
    wanted: list[tuple[int, int]] = []
    buffer = binary = 0
    for column, field in enumerate(schema):
        spans = [(start // 8, -(-end // 8)) if batch.nulls[column] else (0, 0)]
        if pa.types.is_binary(field.type):
            binary = buffer + 2
            spans += [(4 * start, 4 * (end + 1)), (0, 0)]
        else:
            spans.append((_width(field.type) * start, _width(field.type) * end))
        for low, high in spans:
            if high > batch.length[buffer]:
                raise ValueError(f"column {field.name} is shorter than its record batch")
            wanted.append((int(batch.offset[buffer]) + low, high - low))
            buffer += 1
    found = iter(read(wanted))
    columns: list[pa.Array | None] = []
    offsets, valid = np.zeros(1, np.int64), None
    for column, field in enumerate(schema):
        bitmap, data = next(found), next(found)
        mask = _mask(bitmap, start, n) if batch.nulls[column] else None
        if pa.types.is_binary(field.type):
            offsets, valid = np.frombuffer(data, np.int32).astype(np.int64), mask
            columns.append(None)
            next(found)  # its bytes are not read here
            continue
        bits = None if mask is None else pa.py_buffer(np.packbits(mask, bitorder="little"))
        if pa.types.is_dictionary(field.type):
            codes = pa.Array.from_buffers(field.type.index_type, n, [bits, data])
            columns.append(pa.DictionaryArray.from_arrays(codes, dictionary, safe=False))
        else:
            columns.append(pa.Array.from_buffers(field.type, n, [bits, data]))
    return Part(columns, offsets, valid, binary)


def with_bytes(
    batch: RowBatch, schema: pa.Schema, part: Part, start: int, end: int, most: int, read: Read
) -> pa.RecordBatch:
    """Rows [start, end) of a part, complete. most: bytes that the binary column can have."""
    rows, n = slice(start, end), end - start
    offsets = part.offsets[start : end + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    if not 0 <= first <= last <= min(first + most, int(batch.length[part.buffer])):
        raise ValueError(f"contents of {last - first} bytes in {n} rows")
    (data,) = read([(int(batch.offset[part.buffer]) + first, last - first)])
    bits = None if part.valid is None else pa.py_buffer(np.packbits(part.valid[rows], bitorder="little"))
    moved = pa.py_buffer((offsets - first).astype(np.int32))
    content = pa.BinaryArray.from_buffers(pa.binary(), n, [bits, moved, data])
    columns = [content if column is None else column.slice(start, n) for column in part.columns]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _width(kind: pa.DataType) -> int:
    return int((kind.index_type if pa.types.is_dictionary(kind) else kind).bit_width) // 8


def _mask(bits: pa.Buffer, start: int, n: int) -> np.ndarray:
    """bool[n] of a validity bitmap that begins with the byte of row `start`."""
    mask = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
    return mask[start % 8 : start % 8 + n].view(bool)
