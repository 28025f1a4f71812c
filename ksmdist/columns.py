"""Arrow columns as numpy arrays and back, with no copy where the layout allows it.

Written over buffers and not over pyarrow.compute, whose import costs 20 ms of every start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

__all__ = ["arrow", "codes", "joined", "present", "strings", "values"]


def values(array: pa.Array) -> np.ndarray:
    """The values of an integer or boolean array, fixed_size_binary as uint8[n, width]; nulls give any value."""
    kind, n, offset = array.type, len(array), array.offset
    data = array.buffers()[1]
    if pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        return np.frombuffer(data or b"", np.uint8, n * width, offset * width).reshape(n, width)
    if pa.types.is_boolean(kind):
        return _bits(data, offset, n)
    dtype = np.dtype(kind.to_pandas_dtype())
    return np.frombuffer(data or b"", dtype, n, offset * dtype.itemsize)


def codes(array: pa.Array) -> np.ndarray:
    """int32[n]: the indices of a dictionary array with int32 indices, -1 where null."""
    if array.null_count == len(array):
        return np.full(len(array), -1, np.int32)
    return np.where(present(array), values(array.indices), np.int32(-1))


def present(array: pa.Array) -> np.ndarray:
    """bool[n]: which values are not null."""
    mask = array.buffers()[0]
    if mask is None or array.null_count == 0:
        return np.ones(len(array), bool)
    return _bits(mask, array.offset, len(array))


def _bits(data: pa.Buffer, offset: int, n: int) -> np.ndarray:
    if n == 0:
        return np.zeros(0, bool)
    first = offset // 8
    packed = np.frombuffer(data, np.uint8, (offset + n + 7) // 8 - first, first)
    return np.unpackbits(packed, bitorder="little", count=offset % 8 + n)[offset % 8 :].view(bool)


def arrow(column: np.ndarray, null: np.ndarray | None = None) -> pa.Array:
    """An integer or bool array, or uint8[n, width], as an Arrow array; null: bool[n], which are null."""
    column = np.ascontiguousarray(column)
    mask = None
    if null is not None and null.any():
        mask = pa.py_buffer(np.packbits(~null, bitorder="little"))
    if column.ndim == 2:
        return pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(column.shape[1]), len(column), [mask, pa.py_buffer(column)]
        )
    if column.dtype == np.bool_:
        return pa.BooleanArray.from_buffers(
            pa.bool_(), len(column), [mask, pa.py_buffer(np.packbits(column, bitorder="little"))]
        )
    return pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), [mask, pa.py_buffer(column)])


def strings(names: Sequence[str], index: np.ndarray) -> pa.Array:
    """names[i] for each i of `index`, as an Arrow string array; at most 2 GiB of text."""
    encoded = [name.encode() for name in names]
    length = np.array([len(name) for name in encoded], np.int64)
    start = np.cumsum(length) - length
    ends = np.cumsum(length[index])
    offsets = np.concatenate((np.zeros(1, np.int64), ends))
    if offsets[-1] > np.iinfo(np.int32).max:
        raise OverflowError(f"{offsets[-1]} bytes of names in one column: use more ranges")
    source = np.repeat(start[index] - offsets[:-1], length[index]) + np.arange(offsets[-1])
    text = np.frombuffer(b"".join(encoded), np.uint8)[source]
    return pa.StringArray.from_buffers(len(index), pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(text))


def joined(tables: Sequence[pa.Table], name: str) -> np.ndarray:
    """values() of a column of all these tables, end to end."""
    parts = [values(chunk) for table in tables for chunk in table.column(name).chunks]
    if not parts:
        return values(pa.nulls(0, tables[0].schema.field(name).type))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
