"""What a table's definition is made of, and its published form. The tables are in tables/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

__all__ = ["Column", "Key", "Table", "count", "pages", "render"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: Arrow type, meaning, unit (None for what is not a number), nullability, flag bits."""

    name: str
    type: pa.DataType
    doc: str
    unit: str | None = None
    nullable: bool = False
    bits: Mapping[str, int] | None = None

    @property
    def field(self) -> pa.Field:
        """The Arrow field, with `doc` and `unit` as its metadata."""
        metadata = {"doc": self.doc} | ({} if self.unit is None else {"unit": self.unit})
        return pa.field(self.name, self.type, nullable=self.nullable, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a table's schema metadata (UTF-8 text); `default` None means it must be given."""

    name: str
    doc: str
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table: where it is kept, in which order its rows stand, and its columns.

    schema: the Arrow schema, with the metadata keys ksmdist.table and ksmdist.version
    """

    name: str
    version: int
    doc: str
    file: str
    sort: tuple[str, ...]
    columns: tuple[Column, ...]
    keys: tuple[Key, ...] = ()
    schema: pa.Schema = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        metadata = {"ksmdist.table": self.name, "ksmdist.version": str(self.version)}
        schema = pa.schema([column.field for column in self.columns], metadata=metadata)
        object.__setattr__(self, "schema", schema)


def _type_name(type_: pa.DataType) -> str:
    """Arrow's own name of a type, without what only Arrow's C++ library adds to it."""
    if pa.types.is_dictionary(type_):
        return f"dictionary<{_type_name(type_.index_type)}, {_type_name(type_.value_type)}>"
    return str(type_)


def render(table: Table) -> dict[str, object]:
    """The published form of a table's schema: plain JSON values, no Arrow and no Python in it."""
    columns = []
    for column in table.columns:
        rendered: dict[str, object] = {
            "name": column.name,
            "type": _type_name(column.type),
            "nullable": column.nullable,
            "unit": column.unit,
            "doc": column.doc,
        }
        if column.bits is not None:
            rendered["bits"] = dict(column.bits)
        columns.append(rendered)
    keys = [
        {"key": key.name, "required": key.default is None, "default": key.default, "doc": key.doc} for key in table.keys
    ]
    return {
        "name": table.name,
        "version": table.version,
        "doc": table.doc,
        "file": table.file,
        "sort": list(table.sort),
        "metadata": keys,
        "columns": columns,
    }


def count(name: str, doc: str, unit: str, nullable: bool = False) -> Column:
    """An int64 column of numbers of `unit`."""
    return Column(name, pa.int64(), doc, unit=unit, nullable=nullable)


def pages(name: str, doc: str, nullable: bool = False) -> Column:
    """An int64 column of numbers of pages."""
    return count(name, doc, "pages", nullable)
