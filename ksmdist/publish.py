"""A copy of a run's tables that is fit to hand on: no digests, no addresses, no names. docs/publish.md.

What becomes of each column is decided in tables/published.py, and nothing is written that is not named there.
Tables with a row a content or a row a pair of images are put into their new order in passes over the run's file,
so that memory does not grow with them but for 16 bytes a content.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ksmdist import intake, pseudonyms, store, streams
from ksmdist.columns import values
from ksmdist.contents import fill_meaning
from ksmdist.errors import RunDirectoryError, SettingsError
from ksmdist.pseudonyms import NAMED, Pseudonyms
from ksmdist.schema import render
from ksmdist.tables import CONTENTS, IMAGES, REGIONS, SHARING, STABLE_TREE
from ksmdist.tables.published import PUBLISHED, SETTINGS, UNPUBLISHED, WORDS, Publication, Rule, Taken
from ksmdist.version import __version__

__all__ = ["KEEPABLE", "PUBLICATION_VERSION", "publish"]

PUBLICATION_VERSION = 1
"""Version of publication.json and of the directory's layout."""

KEEPABLE: tuple[str, ...] = (*NAMED, "order")
"""What a publication can keep on request: names, and the order in which images are scanned."""

_AS_IN_RUN = {Rule.KEEP, Rule.WORD}  # a table of these alone keeps the order of its rows
_PASS_ROWS = 1 << 20
_MOST_NAMES_BYTES = 256 << 20


def publish(
    run: Path, out: Path, keep: Collection[str] = (), names: Path | None = None, seed: bytes | None = None
) -> dict[str, Any]:
    """Write the publication of a run as a new directory, 0700 with files of 0600; returns what publication.json says.

    keep:  of KEEPABLE. names: a file of the names' numbers, 0600, read where it is there and written anew: publications
    with one file have the same numbers for the same names. seed: pseudonyms.SEED_BYTES bytes that all that is random
    comes of; None: the operating system's. Raises SettingsError; RunDirectoryError where `out` exists, the run or the
    file of names is not what it should be, or something cannot be written.
    """
    unknown = sorted(set(keep) - set(KEEPABLE))
    if unknown:
        raise SettingsError(f"{unknown[0]!r} cannot be kept", "--keep", f"use {', '.join(KEEPABLE)}")
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(run)):
        raise SettingsError("is in the run that must not be handed on", str(out), "choose a directory elsewhere")
    manifest = store.read_manifest(run)
    images = store.read_table(run, IMAGES)
    drawn = os.urandom(pseudonyms.SEED_BYTES) if seed is None else seed
    known = _read_names(names)
    with _readable(run, IMAGES.name):
        if images.column("scan_order").to_pylist() != list(range(len(images))):
            raise ValueError("its images are not numbered from 0")
        of = {"images": "image_id", "hosts": "host", "tenants": "tenant"}
        numbers = {
            named: pseudonyms.numbered(images.column(of[named]).to_pylist(), known[named], drawn, named)
            for named in NAMED
        }
    publisher = _Publisher(run, images, Pseudonyms(numbers, frozenset(keep)), "order" in keep, drawn, _top(manifest))
    with streams.new_directory(out) as directory:
        rows = {
            name: publisher.write(publication, directory)
            for name, publication in PUBLISHED.items()
            if "order" in keep or not publication.with_order
        }
        said = _said(manifest, images, rows, keep, names is not None)
        store.write_text(json.dumps(said, indent=1) + "\n", directory, "publication.json")
        if names is not None:
            text = json.dumps({"ksmdist_names": 1} | numbers, indent=1, sort_keys=True) + "\n"
            store.write_text(text, names.absolute().parent, names.name)
    return said


def _said(
    manifest: Mapping[str, Any], images: pa.Table, rows: Mapping[str, int], keep: Collection[str], named: bool
) -> dict[str, Any]:
    """What publication.json says."""
    tables = [render(PUBLISHED[name].table) | {"rows": count} for name, count in rows.items()]
    left_out = {name: dict(PUBLISHED[name].left_out) for name in rows if PUBLISHED[name].left_out}
    with_order = {name: "tells the order of the images" for name in PUBLISHED if name not in rows}
    lost = images.column("unreadable")
    return {
        "publication_version": PUBLICATION_VERSION,
        "ksmdist": __version__,
        "settings": {name: manifest["settings"].get(name) for name in SETTINGS},
        "kept": sorted(keep),
        "numbers": "those of the file of names" if named else "of this publication alone",
        "images": len(images),
        "hosts": len(set(images.column("host").to_pylist()) - {""}),
        "tenants": len(set(images.column("tenant").to_pylist()) - {""}),
        "pages_unreadable": pc.sum(lost).as_py() or 0,
        "images_out_of_reach": lost.null_count,
        "images_filtered": sum(level != "" for level in images.column("filter_level").to_pylist()),
        "caveats": len(manifest["caveats"]),
        "caveats_note": "texts of caveats name images and files and are left out: ask whoever made this for them",
        "tables": tables,
        "columns_left_out": left_out,
        "tables_left_out": dict(UNPUBLISHED) | with_order,
    }


def _top(manifest: Mapping[str, Any]) -> int:
    return int(manifest["settings"]["contents"])


@contextmanager
def _readable(run: Path, name: str) -> Iterator[None]:
    """Turns what goes wrong with values of a table of the run into RunDirectoryError."""
    try:
        yield
    except (pa.ArrowException, ValueError, KeyError, IndexError, OverflowError) as error:
        why = str(error).splitlines()[0] if isinstance(error, pa.ArrowException | ValueError) else "unknown images"
        raise RunDirectoryError(
            f"has a table {name} that is not what it should be: {why}", str(run), "run the images again"
        ) from None


def _read_names(path: Path | None) -> dict[str, dict[str, int]]:
    """The numbers of names in a file that publish() wrote; none where there is no file."""
    if path is None or not os.path.lexists(path):
        return {named: {} for named in NAMED}
    try:
        with open(path, "rb") as file:
            found = intake.parsed(file.read(_MOST_NAMES_BYTES))
        if found.pop("ksmdist_names") != 1 or set(found) != set(NAMED):
            raise ValueError
        for numbers in found.values():
            given = list(numbers.values())
            if not all(type(n) is int and 0 < n < 1 << 30 for n in given) or len(set(given)) < len(given):
                raise ValueError
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise RunDirectoryError(
            "is no file of names that can be read", str(path), "give one that --names wrote, or a new name"
        ) from None
    return dict(found)


@dataclass(slots=True)
class _Publisher:
    """Writes the tables of one run. numbers: int32, ram: bool[images], by scan order; contents: numbers by digest.

    top: most rows that the run's table contents could have.
    """

    run: Path
    images: pa.Table
    names: Pseudonyms
    order: bool
    seed: bytes
    top: int
    numbers: np.ndarray = field(init=False)
    ram: np.ndarray = field(init=False)
    salts: dict[int, int] = field(init=False)
    contents: dict[bytes, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        ids, kinds = (self.images.column(name).to_pylist() for name in ("image_id", "kind"))
        with _readable(self.run, IMAGES.name):
            self.numbers = np.array([self.names.numbers["images"][name] for name in ids], np.int32)
        self.ram = np.array([kind in ("guest", "kernel") for kind in kinds], bool)
        salts = sorted({salt for salt in self.images.column("salt").to_pylist() if salt})
        drawn = pseudonyms.random_order(self.seed, "salts", len(salts)).tolist()
        self.salts = {0: 0} | {salts[at]: n for n, at in enumerate(drawn, 1)}

    def write(self, publication: Publication, directory: Path) -> int:
        """Write one table; returns its rows."""
        name = publication.source.name
        with _readable(self.run, name):
            if publication.source in (STABLE_TREE, SHARING):
                written = 0
                with streams.table_writer(publication.table, directory) as write:
                    pieces = self._stable_tree() if name == STABLE_TREE.name else self._sharing()
                    for piece in pieces:
                        rows = self._published(publication, piece)
                        write(rows)
                        written += len(rows)
                return written
            table = store.read_table(self.run, publication.source)
            if publication.source is CONTENTS:
                table = self._ranked(table)
            rows = self._published(publication, table)
            store.write_table(rows, publication.table, directory)
            return len(rows)

    def _published(self, publication: Publication, table: pa.Table) -> pa.Table:
        """The published rows of these rows, in their order."""
        arrays = {taken.name: self._column(publication, taken, table) for taken in publication.taken}
        if publication.pairs:
            one, other = (arrays[name] for name in publication.pairs[0])
            wrong = pc.greater(one, other)
            for a, b in publication.pairs:
                arrays[a], arrays[b] = (
                    pc.if_else(wrong, arrays[b], arrays[a]),
                    pc.if_else(wrong, arrays[a], arrays[b]),
                )
        schema = publication.table.schema
        columns = [arrays[field.name].cast(field.type) for field in schema]
        rows = pa.Table.from_arrays(columns, schema=schema)
        if publication.source is REGIONS:
            rows = _added_up(rows, ["image", "region"])
        if {taken.rule for taken in publication.taken} <= _AS_IN_RUN:
            return rows
        keys = [(name, "ascending") for name in publication.table.sort]
        return rows.take(pc.sort_indices(rows, sort_keys=keys))  # stable, as its documentation says

    def _column(self, publication: Publication, taken: Taken, table: pa.Table) -> pa.Array:
        """A published column."""
        if taken.rule in (Rule.CONTENT, Rule.RANK):
            return _array(table, f"published_{taken.name}")
        source = _array(table, taken.source)
        match taken.rule:
            case Rule.KEEP:
                return source
            case Rule.WORD:
                words = WORDS.get(f"{publication.source.name}.{taken.name}", WORDS.get(taken.name, ()))
                return _mapped(source, lambda word: word if word in words else "other")
            case Rule.IMAGE:
                return pa.array(self.numbers[self._numbers_of(source)])
            case Rule.IMAGE_ID:
                return _mapped(source, lambda name: self.names.shown("images", name))
            case Rule.HOST:
                return _mapped(source, lambda name: self.names.shown("hosts", name))
            case Rule.TENANT:
                return _mapped(source, lambda name: self.names.shown("tenants", name))
            case Rule.SALT:
                return _mapped(source, self.salts.__getitem__)
            case Rule.REGION:
                classes = _mapped(source, pseudonyms.region_class)
                in_ram = pc.and_(pa.array(self._in_ram(table)), pc.is_valid(source))
                return pc.if_else(in_ram, "ram", classes)
            case Rule.FILL_WORD:
                return _mapped(source, lambda word: word if not word or fill_meaning(word) else None)
            case Rule.HOLDER:
                shown = _mapped(source, lambda name: self.names.shown("images", name))
                several = pc.greater(_array(table, "images"), 1)
                return shown if self.order else pc.if_else(several, pa.scalar(None, pa.string()), shown)
            case Rule.ORDER:
                return source if self.order else pa.nulls(len(table), source.type)
            case Rule.FILTERED:
                return pc.not_equal(source, "")

    def _numbers_of(self, column: pa.Array) -> np.ndarray:
        """The scan orders in a column, checked."""
        found: np.ndarray = values(column)
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < len(self.numbers):
            raise IndexError
        return found

    def _in_ram(self, table: pa.Table) -> np.ndarray:
        """bool[n]: rows whose image is all memory of a machine: what its regions are called is no process's."""
        if "image" in table.column_names:
            ram: np.ndarray = self.ram[self._numbers_of(_array(table, "image"))]
            return ram
        ids = self.images.column("image_id").to_pylist()
        known = {name for name, ram in zip(ids, self.ram.tolist(), strict=True) if ram}
        return np.array([name in known for name in table.column("first_image").to_pylist()], bool)

    def _stable_tree(self) -> Iterator[pa.Table]:
        """The stable tree in random order, a stretch of it at a time; then the numbers of table contents are known."""
        wanted = dict.fromkeys(store.read_table(self.run, CONTENTS).column("digest").to_pylist(), -1)
        among = np.array(sorted(wanted), "S16")
        count = 0
        for batch in streams.read_batches(self.run, STABLE_TREE, ("digest",)):
            digests = values(batch.column(0))
            places = np.ascontiguousarray(digests).view("S16").reshape(-1) if len(batch) else among[:0]
            for at in np.flatnonzero(np.isin(places, among)).tolist():
                wanted[digests[at].tobytes()] = count + at
            count += len(batch)
        order = pseudonyms.random_order(self.seed, "contents", count)
        place = np.empty(count, np.int64)
        place[order] = np.arange(1, count + 1)
        del order
        self.contents = {digest: int(place[row]) for digest, row in wanted.items() if row >= 0}
        taken = [one.source for one in PUBLISHED[STABLE_TREE.name].taken if one.rule is not Rule.CONTENT]

        def keyed() -> Iterator[tuple[np.ndarray, pa.Table]]:
            at = 0
            for batch in streams.read_batches(self.run, STABLE_TREE, taken):
                numbers = place[at : at + len(batch)]
                at += len(batch)
                yield numbers, pa.Table.from_batches([batch]).append_column("published_content", pa.array(numbers))

        yield from _in_passes(keyed, [*range(1, count + 1, _PASS_ROWS), count + 1])

    def _sharing(self) -> Iterator[pa.Table]:
        """Table sharing by the numbers of images, a stretch of it at a time."""
        rank = np.argsort(np.argsort(self.numbers))

        def keyed() -> Iterator[tuple[np.ndarray, pa.Table]]:
            for batch in streams.read_batches(self.run, SHARING):
                one, other = (rank[self._numbers_of(batch.column(name))] for name in ("image", "other"))
                yield np.minimum(one, other), pa.Table.from_batches([batch])

        rows = np.zeros(len(rank), np.int64)
        for key, _ in keyed():
            rows += np.bincount(key, minlength=len(rank))
        part = np.cumsum(rows) // _PASS_ROWS
        starts = np.flatnonzero(np.concatenate(([True], part[1:] != part[:-1]))) if len(part) else np.zeros(0, int)
        yield from _in_passes(keyed, [*starts.tolist(), len(rank)])

    def _ranked(self, table: pa.Table) -> pa.Table:
        """Table contents by copies, equals in random order, with columns published_rank and published_content.

        Where the table was cut off, contents with fewest copies have no number: those that are in it have the lowest
        digests of their like, and the others of the stable tree would be known to have higher ones.
        """
        copies = table.column("copies").to_numpy()
        drawn = pseudonyms.random_order(self.seed, "ranks", len(table))
        order = drawn[np.argsort(-copies[drawn], kind="stable")]
        cut = int(copies.min()) if len(table) >= max(self.top, 1) else 0
        digests = table.column("digest").to_pylist()
        content = [None if copies[row] == cut else self.contents.get(digests[row]) for row in order.tolist()]
        table = table.take(pa.array(order))
        table = table.append_column("published_rank", pa.array(np.arange(1, len(table) + 1, dtype=np.int32)))
        return table.append_column("published_content", pa.array(content, pa.int64()))


def _array(table: pa.Table, name: str) -> pa.Array:
    return table.column(name).combine_chunks()


def _mapped(column: pa.Array, of: Callable[[Any], Any]) -> pa.Array:
    """A column with of(value) for each value, asked once for each that differs; null stays null."""
    encoded = column.dictionary_encode()
    new = [None if value is None else of(value) for value in encoded.dictionary.to_pylist()]
    return pa.array(new, column.type).take(encoded.indices)


def _added_up(rows: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Rows with the same keys as one, all other columns added up."""
    sums = [name for name in rows.column_names if name not in keys]
    grouped = rows.group_by(list(keys), use_threads=False).aggregate([(name, "sum") for name in sums])
    columns = [grouped.column(f"{name}_sum" if name in sums else name) for name in rows.column_names]
    return pa.Table.from_arrays(columns, schema=rows.schema)


def _in_passes(keyed: Callable[[], Iterator[tuple[np.ndarray, pa.Table]]], bounds: Sequence[int]) -> Iterator[pa.Table]:
    """The rows whose key is in [low, high) for each two neighbours of bounds, all that keyed() gives read for each."""
    for low, high in pairwise(bounds):
        some = [rows.filter(pa.array((low <= key) & (key < high))) for key, rows in keyed()]
        if some:
            yield pa.concat_tables(some)
