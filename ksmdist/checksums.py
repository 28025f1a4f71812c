"""Files of table `checksums`: one a task, a row group for each stretch of an image, found again by their footers."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ksmdist.errors import RunDirectoryError
from ksmdist.passes import Compared
from ksmdist.store import whole_file
from ksmdist.tables import CHECKSUMS

__all__ = ["Stretch", "find", "read", "read_summary", "write"]

_SUMMARY = b"ksmdist.compared"
_GROUP_ROWS = 1 << 18


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows of an image in a file. first, last: addresses, bytes."""

    path: str
    row_group: int
    image: int
    first: int
    last: int
    rows: int


def write(path: Path, tables: Iterable[pa.Table], compared: Mapping[int, Compared]) -> None:
    """Write `checksums` rows, tables of one image each, in order; compared: by image, kept with them.

    A row group is of one image, and of as many pages as a shard has at most.

    Raises RunDirectoryError where it cannot be written.
    """
    summary = {str(image): asdict(found) for image, found in compared.items()}
    schema = CHECKSUMS.schema.with_metadata({**CHECKSUMS.schema.metadata, _SUMMARY: json.dumps(summary)})
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with (
            whole_file(path) as sink,
            pq.ParquetWriter(
                sink, schema, compression="zstd", compression_level=1, use_dictionary=["image", "age"]
            ) as to,
        ):
            for table in _joined(tables):
                to.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=len(table))
    except OSError as error:
        raise RunDirectoryError(
            f"cannot be written: {error.strerror or error}", str(path), "free some space, or choose another -o"
        ) from None


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Neighbours of one image together, up to _GROUP_ROWS: batches of pages may be small."""
    waiting: list[pa.Table] = []
    for table in tables:
        if len(table) == 0:
            continue
        if waiting and (waiting[0]["image"][0] != table["image"][0] or sum(map(len, waiting)) >= _GROUP_ROWS):
            yield pa.concat_tables(waiting)
            waiting = []
        waiting.append(table)
    if waiting:
        yield pa.concat_tables(waiting)


def read_summary(path: Path) -> dict[int, Compared] | None:
    """What write() kept with a file, by image; None where there is no such file, or it is not whole."""
    try:
        metadata = pq.read_metadata(path).metadata
        return {int(image): Compared(**found) for image, found in json.loads(metadata[_SUMMARY]).items()}
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def find(files: Sequence[Path]) -> dict[int, list[Stretch]]:
    """The stretches of each image in these files, by image, in order of address. Raises RunDirectoryError."""
    found: dict[int, list[Stretch]] = {}
    names = CHECKSUMS.schema.names
    for path in files:
        try:
            footer = pq.read_metadata(path)
            for number in range(footer.num_row_groups):
                group = footer.row_group(number)
                image, address = (group.column(names.index(name)).statistics for name in ("image", "address"))
                stretch = Stretch(str(path), number, image.min, address.min, address.max, group.num_rows)
                found.setdefault(stretch.image, []).append(stretch)
        except (OSError, ValueError, AttributeError, pa.ArrowException) as error:
            raise _unreadable(path, error) from None
    for stretches in found.values():
        stretches.sort(key=lambda stretch: stretch.first)
    return found


def read(stretches: Sequence[Stretch], first: int, last: int) -> pa.Table:
    """The rows of those stretches that may have addresses from `first` to `last`, by address.

    Raises RunDirectoryError.
    """
    wanted = [stretch for stretch in stretches if stretch.first <= last and stretch.last >= first]
    return pa.concat_tables(
        [CHECKSUMS.schema.empty_table(), *(_group(one.path, one.row_group, _written(one.path)) for one in wanted)]
    )


def _written(path: str) -> tuple[int, int]:
    """Tells a file from another that had the same name before."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(Path(path), error) from None
    return found.st_ino, found.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _group(path: str, number: int, written: tuple[int, int]) -> pa.Table:
    try:
        return pq.ParquetFile(path).read_row_group(number).cast(CHECKSUMS.schema)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(Path(path), error) from None


def _unreadable(path: Path, error: Exception) -> RunDirectoryError:
    return RunDirectoryError(
        f"cannot be read: {str(error).splitlines()[0]}", str(path), "run the earlier pass again, with --checksums"
    )
