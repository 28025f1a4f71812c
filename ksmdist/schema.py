"""What a table's definition is made of, and its published forms. The tables are in tables/."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

__all__ = ["Column", "Key", "Table", "count", "pages", "render", "render_index", "render_markdown"]

_WIDTH = 120  # of a line of text in the documents
_RENDERED = "<!-- Rendered from ksmdist/tables by `make schemas`: edit it there. -->"


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


def render_markdown(table: Table) -> str:
    """A table's page of docs/tables/: where it is, how its rows stand, its metadata, every column."""
    place = f"File: `{table.file}`." if table.file else "Kept in no file of a run."
    order = ", ".join(f"`{name}`" for name in table.sort)
    schema = f"{table.name}.v{table.version}.json"
    parts = [
        f"# {table.name}",
        _RENDERED,
        _wrapped(table.doc),
        _wrapped(
            f"Version {table.version}. {place} Rows are in the order of {order}. As JSON: "
            f"[schemas/{schema}](../../schemas/{schema})."
        ),
        "## Columns",
        _grid(
            ("column", "type", "null", "unit", "meaning"),
            (
                (f"`{c.name}`", f"`{_type_name(c.type)}`", "yes" if c.nullable else "", c.unit or "", c.doc)
                for c in table.columns
            ),
        ),
    ]
    for column in table.columns:
        if column.bits is not None:
            bits = ((f"`{name}`", f"`{mask:#x}`") for name, mask in column.bits.items())
            parts += [f"Bits of `{column.name}`:", _grid(("bit", "mask"), bits)]
    parts.append("## Metadata")
    if table.keys:
        keys = ((f"`{key.name}`", _default(key), key.doc) for key in table.keys)
        parts.append(_grid(("key", "left out", "meaning"), keys))
    else:
        parts.append(f"`ksmdist.table` is `{table.name}`, `ksmdist.version` is `{table.version}`.")
    return "\n\n".join(parts) + "\n"


def render_index(tables: Iterable[Table]) -> str:
    """The page docs/tables/README.md: all tables, in their order, with their files and what they are."""
    rows = ((f"[{t.name}]({t.name}.md)", f"`{t.file}`" if t.file else "", _short(t.doc)) for t in tables)
    text = (
        "A page for each table, with every column. Files that end in .parquet are in the run directory; those of a "
        "diff are where the command writes them. Any reader of Parquet will do, with no ksmdist: in DuckDB "
        "`select * from 'out/contents.parquet'`, in pandas and Polars `read_parquet('out/contents.parquet')`. Where "
        "there is a file for each range or task, `out/stable_tree/*.parquet` is the table."
    )
    return "\n\n".join(("# Tables", _RENDERED, _wrapped(text), _grid(("table", "file", "what"), rows))) + "\n"


def _default(key: Key) -> str:
    """What a key is where a file does not have it."""
    if key.default is None:
        return "it must be there"
    return f"`{key.default}`" if key.default else "empty"


def _short(doc: str) -> str:
    """The first sentence, or what is before its colon; what is in parentheses is not cut."""
    return re.split(r"(?:[.:] |; )(?![^(]*\))", doc.removesuffix("."))[0]


def _wrapped(text: str) -> str:
    """Text in lines of _WIDTH at most; a word or link is not cut."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; `|` in a cell is not the next cell."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def count(name: str, doc: str, unit: str, nullable: bool = False) -> Column:
    """An int64 column of numbers of `unit`."""
    return Column(name, pa.int64(), doc, unit=unit, nullable=nullable)


def pages(name: str, doc: str, nullable: bool = False) -> Column:
    """An int64 column of numbers of pages."""
    return count(name, doc, "pages", nullable)
