"""Files of table `checksums`: one a task, a row group for each stretch of an image, found again by their footers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ksmdist import intake
from ksmdist.errors import RunDirectoryError
from ksmdist.passes import Compared
from ksmdist.store import whole_file
from ksmdist.tables import CHECKSUMS

__all__ = ["Stretch", "find", "read", "read_summary", "write"]

_SUMMARY = b"ksmdist.compared"
_GROUP_ROWS = 1 << 18
_MOST_GROUP_ROWS = 1 << 22  # a batch of pages more than _GROUP_ROWS, whatever the size of a batch


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
        with intake.open_arrow(*_place(path)) as source:
            metadata = pq.ParquetFile(source).metadata.metadata
        said = intake.parsed(metadata[_SUMMARY]).items()
        if not all(type(number) is int and number >= 0 for _, found in said for number in found.values()):
            return None
        return {int(image): Compared(**found) for image, found in said}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException, RunDirectoryError):
        return None


def _place(path: Path) -> tuple[Path, str]:
    """The run directory of a file, and the file's name in it."""
    return path.parents[1], f"{path.parent.name}/{path.name}"


def find(files: Sequence[Path]) -> dict[int, list[Stretch]]:
    """The stretches of each image in these files, by image, in order of address. Raises RunDirectoryError."""
    found: dict[int, list[Stretch]] = {}
    names = CHECKSUMS.schema.names
    for path in files:
        try:
            with intake.open_arrow(*_place(path)) as source:
                footer = pq.ParquetFile(source).metadata
            for number in range(footer.num_row_groups):
                group = footer.row_group(number)
                image, address = (group.column(names.index(name)).statistics for name in ("image", "address"))
                said = (image.min, address.min, address.max)
                if not (all(type(one) is int for one in said) and 0 <= group.num_rows <= _MOST_GROUP_ROWS):
                    raise ValueError("it has a row group that ksmdist does not write")
                stretch = Stretch(str(path), number, *said, group.num_rows)
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
        found = Path(path).stat()
    except OSError as error:
        raise _unreadable(Path(path), error) from None
    return found.st_ino, found.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _group(path: str, number: int, written: tuple[int, int]) -> pa.Table:
    try:
        with intake.open_arrow(*_place(Path(path))) as source:
            rows = pq.ParquetFile(source).read_row_group(number).cast(CHECKSUMS.schema)
        rows.validate(full=True)
        return rows
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(Path(path), error) from None


def _unreadable(path: Path, error: Exception) -> RunDirectoryError:
    return RunDirectoryError(
        f"cannot be read: {str(error).splitlines()[0]}", str(path), "run the earlier pass again, with --checksums"
    )
