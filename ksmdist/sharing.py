"""All that a prediction needs of a scan, whatever the settings: spectra, patterns, and pages by image.

It is small, it is kept in every run, and no what-if touches the images again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow, joined, present, strings, values
from ksmdist.ksmd import Stretch
from ksmdist.mappings import PATTERN_COLUMNS, Patterns, pattern_rows
from ksmdist.tables import IMAGE_SPECTRUM, IMAGES, KINDS, MAPPINGS, POLICY_SPECTRUM, SCOPES, SPECTRUM
from ksmdist.tree import ALL_NODES

__all__ = ["Followed", "Pattern", "Sharing"]

_IMAGE, _REGION, _NODE, _HUGE, _FRAME, _PAGES = range(len(PATTERN_COLUMNS))


@dataclass(frozen=True, slots=True)
class Pattern:
    """Contents whose mappings are alike. rows: int64[n, len(PATTERN_COLUMNS)], in scan order."""

    kind: int
    contents: int
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Followed:
    """Contents that the procedure of ksmd.py is followed for: how many alike, and their mappings in scan order.

    whole:     all of them
    stretches: those that are no zero pages of a huge page
    lone_huge: those that are the only zero page of a huge page
    """

    contents: int
    kind: int
    whole: tuple[Stretch, ...]
    stretches: tuple[Stretch, ...]
    lone_huge: tuple[Stretch, ...]


@dataclass(frozen=True, eq=False)
class Sharing:
    """What the images of a run share.

    images:         table `images`
    region_names:   what regions are an index of
    spectrum:       int64[n, 5]: numa_node or ALL_NODES, kind, copies, frames, contents
    image_spectrum: int64[n, 7]: numa_node or ALL_NODES, image, copies, before, here, region or -1, contents;
                    only over all nodes where all pages are on one
    scopes:         int64[n, 5]: numa_node or ALL_NODES, scope, kind, copies, contents
    patterns:       of zero, and of contents that have a frame which fork shares
    """

    images: pa.Table
    region_names: tuple[str, ...]
    spectrum: np.ndarray
    image_spectrum: np.ndarray
    scopes: np.ndarray
    patterns: tuple[Pattern, ...]

    @classmethod
    def of(
        cls,
        images: pa.Table,
        region_names: Sequence[str],
        spectrum: np.ndarray,
        image_spectrum: np.ndarray,
        scopes: np.ndarray,
        patterns: Patterns,
    ) -> Sharing:
        """From what merges found: sums over all ranges."""
        read = tuple(Pattern(kind, n, rows) for key, n in patterns.items() for kind, rows in [pattern_rows(key)])
        return cls(images, tuple(region_names), spectrum, image_spectrum, scopes, read)

    @classmethod
    def from_tables(cls, tables: Mapping[str, pa.Table]) -> Sharing:
        """From a run's tables images, spectrum, image_spectrum, policy_spectrum and mappings, by name."""
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
            _matrix(tables[POLICY_SPECTRUM.name], POLICY_SPECTRUM.schema.names, regions, kinds),
            patterns,
        )

    def tables(self) -> dict[str, pa.Table]:
        """The tables spectrum, image_spectrum, policy_spectrum and mappings, by name."""
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
            POLICY_SPECTRUM.name: self._table(POLICY_SPECTRUM.schema, self.scopes.T),
            MAPPINGS.name: self._table(MAPPINGS.schema, [mappings[name] for name in MAPPINGS.schema.names]),
        }

    @cached_property
    def followed(self) -> tuple[Followed, ...]:
        """The patterns, for merge_across_nodes on."""
        return tuple(_followed(pattern, pattern.rows) for pattern in self.patterns)

    @cached_property
    def followed_by_node(self) -> tuple[Followed, ...]:
        """The patterns on each of their nodes, for merge_across_nodes off."""
        if self.one_node:
            return self.followed
        nodes = [(pattern, pattern.rows[:, _NODE]) for pattern in self.patterns]
        return tuple(
            _followed(pattern, pattern.rows[node == number])
            for pattern, node in nodes
            for number in np.unique(node).tolist()
        )

    @cached_property
    def tenants(self) -> np.ndarray:
        """int64[images]: a number for the tenant of each."""
        return np.unique(np.array(self.images.column("tenant").to_pylist(), object), return_inverse=True)[1]

    @cached_property
    def salts(self) -> np.ndarray:
        """int64[images]: the number of the group of images with the salt of each."""
        return self.of_images("salt")

    @property
    def one_node(self) -> bool:
        """Whether all pages are on one NUMA node, and merge_across_nodes changes nothing."""
        return len(np.unique(self.spectrum[:, 0])) <= 2

    def by_image(self, across_nodes: bool) -> np.ndarray:
        """The rows of image_spectrum over all nodes, or those for each node."""
        if self.one_node:
            return self.image_spectrum
        chosen: np.ndarray = self.image_spectrum[(self.image_spectrum[:, 0] == ALL_NODES) == across_nodes]
        return chosen

    def of_images(self, column: str) -> np.ndarray:
        """A column of the images table, int64, by image; null (unknown) as 0."""
        chunk = self.images.column(column).combine_chunks()
        return np.where(present(chunk), values(chunk), 0).astype(np.int64)

    def _table(self, schema: pa.Schema, columns: Sequence[np.ndarray] | np.ndarray) -> pa.Table:
        """Integer columns as the schema has them: names for numbers, null for -1 where it may be."""
        arrays = []
        for field, column in zip(schema, columns, strict=True):
            if field.name == "kind":
                arrays.append(strings(KINDS, column))
            elif field.name == "scope":
                arrays.append(strings(SCOPES, column))
            elif field.name == "region":
                names = np.array([*self.region_names, None], object)
                arrays.append(pa.array(names[column].tolist(), pa.string()))
            else:
                typed = column.astype(field.type.to_pandas_dtype())
                arrays.append(arrow(typed, null=(column == -1) if field.nullable else None))
        return pa.Table.from_arrays(arrays, schema=schema)


def _followed(pattern: Pattern, rows: np.ndarray) -> Followed:
    whole = tuple(Stretch(row[_IMAGE], row[_REGION], row[_FRAME], row[_PAGES]) for row in rows.tolist())
    marked = list(zip(whole, rows[:, _HUGE].tolist(), strict=True))
    return Followed(
        pattern.contents,
        pattern.kind,
        whole,
        tuple(stretch for stretch, huge in marked if not huge),
        tuple(stretch for stretch, huge in marked if huge > 1),
    )


def _matrix(table: pa.Table, names: Sequence[str], regions: Mapping[Any, int], kinds: Mapping[str, int]) -> np.ndarray:
    """Columns of a table as int64[n, k]: numbers for names, -1 for null."""
    columns = []
    scopes = {name: number for number, name in enumerate(SCOPES)}
    for name in names:
        column = table.column(name)
        if name in ("region", "kind", "scope"):
            numbers = {"region": regions, "kind": kinds, "scope": scopes}[name]
            columns.append(np.array([numbers[value] for value in column.to_pylist()], np.int64))
            continue
        chunk = column.combine_chunks()
        columns.append(np.where(present(chunk), values(chunk).astype(np.int64), ALL_NODES))
    return np.stack(columns, axis=1) if len(table) else np.zeros((0, len(names)), np.int64)
