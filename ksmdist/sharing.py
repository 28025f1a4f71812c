"""All that a prediction needs of a scan, whatever the settings: spectra, patterns, and pages by image.

It is small, it is kept in every run, and no what-if touches the images again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow, joined, present, strings, values
from ksmdist.mappings import PATTERN_COLUMNS, Patterns, pattern_rows
from ksmdist.tables import IMAGE_SPECTRUM, IMAGES, KINDS, MAPPINGS, SPECTRUM
from ksmdist.tree import ALL_NODES

__all__ = ["Pattern", "Sharing"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Contents whose mappings are alike. rows: int64[n, len(PATTERN_COLUMNS)], in scan order."""

    kind: int
    contents: int
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Sharing:
    """What the images of a run share.

    images:         table `images`
    region_names:   what regions are an index of
    spectrum:       int64[n, 5]: numa_node or ALL_NODES, kind, copies, frames, contents
    image_spectrum: int64[n, 7]: numa_node or ALL_NODES, image, copies, before, here, region or -1, contents
    patterns:       of zero, and of contents that have a frame which fork shares
    """

    images: pa.Table
    region_names: tuple[str, ...]
    spectrum: np.ndarray
    image_spectrum: np.ndarray
    patterns: tuple[Pattern, ...]

    @classmethod
    def of(
        cls,
        images: pa.Table,
        region_names: Sequence[str],
        spectrum: np.ndarray,
        image_spectrum: np.ndarray,
        patterns: Patterns,
    ) -> Sharing:
        """From what merges found: sums over all ranges."""
        read = tuple(Pattern(kind, n, rows) for key, n in patterns.items() for kind, rows in [pattern_rows(key)])
        return cls(images, tuple(region_names), spectrum, image_spectrum, read)

    @classmethod
    def from_tables(cls, tables: Mapping[str, pa.Table]) -> Sharing:
        """From a run's tables images, spectrum, image_spectrum and mappings, by name."""
        spectrum, by_image, mappings = (tables[table.name] for table in (SPECTRUM, IMAGE_SPECTRUM, MAPPINGS))
        names = sorted({name for table in (by_image, mappings) for name in table.column("region").to_pylist() if name})
        regions = {name: number for number, name in enumerate(names)} | {None: -1}
        kinds = {name: number for number, name in enumerate(KINDS)}
        rows = _matrix(mappings, PATTERN_COLUMNS, regions, kinds)
        pattern = joined([mappings], "pattern")
        starts = np.flatnonzero(np.diff(pattern, prepend=-1))
        contents, kind = joined([mappings], "contents"), mappings.column("kind").to_pylist()
        patterns = tuple(
            Pattern(kinds[kind[start]], int(contents[start]), some)
            for start, some in zip(starts.tolist(), np.split(rows, starts[1:]), strict=False)
        )
        return cls(
            tables[IMAGES.name],
            tuple(names),
            _matrix(spectrum, SPECTRUM.schema.names, regions, kinds),
            _matrix(by_image, IMAGE_SPECTRUM.schema.names, regions, kinds),
            patterns,
        )

    def tables(self) -> dict[str, pa.Table]:
        """The tables spectrum, image_spectrum and mappings, by name."""
        lengths = np.array([len(pattern.rows) for pattern in self.patterns], np.int64)
        rows = [pattern.rows for pattern in self.patterns] or [np.zeros((0, len(PATTERN_COLUMNS)), np.int64)]
        numbers = np.arange(len(self.patterns))
        mappings = {
            "pattern": np.repeat(numbers, lengths),
            "contents": np.repeat(np.array([pattern.contents for pattern in self.patterns], np.int64), lengths),
            "kind": np.repeat(np.array([pattern.kind for pattern in self.patterns], np.int64), lengths),
        } | dict(zip(PATTERN_COLUMNS, np.concatenate(rows).T, strict=True))
        return {
            SPECTRUM.name: self._table(SPECTRUM.schema, self.spectrum.T),
            IMAGE_SPECTRUM.name: self._table(IMAGE_SPECTRUM.schema, self.image_spectrum.T),
            MAPPINGS.name: self._table(MAPPINGS.schema, [mappings[name] for name in MAPPINGS.schema.names]),
        }

    def of_images(self, column: str) -> np.ndarray:
        """A column of the images table, int64, by image."""
        return np.asarray(joined([self.images], column), np.int64)

    def _table(self, schema: pa.Schema, columns: Sequence[np.ndarray] | np.ndarray) -> pa.Table:
        """Integer columns as the schema has them: names for numbers, null for -1 where it may be."""
        arrays = []
        for field, column in zip(schema, columns, strict=True):
            if field.name == "kind":
                arrays.append(strings(KINDS, column))
            elif field.name == "region":
                names = np.array([*self.region_names, None], object)
                arrays.append(pa.array(names[column].tolist(), pa.string()))
            elif pa.types.is_boolean(field.type):
                arrays.append(arrow(column != 0))
            else:
                typed = column.astype(field.type.to_pandas_dtype())
                arrays.append(arrow(typed, null=(column == -1) if field.nullable else None))
        return pa.Table.from_arrays(arrays, schema=schema)


def _matrix(table: pa.Table, names: Sequence[str], regions: Mapping[Any, int], kinds: Mapping[str, int]) -> np.ndarray:
    """Columns of a table as int64[n, k]: numbers for names, -1 for null."""
    columns = []
    for name in names:
        column = table.column(name)
        if name in ("region", "kind"):
            numbers = regions if name == "region" else kinds
            columns.append(np.array([numbers[value] for value in column.to_pylist()], np.int64))
            continue
        chunk = column.combine_chunks()
        columns.append(np.where(present(chunk), values(chunk).astype(np.int64), ALL_NODES))
    return np.stack(columns, axis=1) if len(table) else np.zeros((0, len(names)), np.int64)
