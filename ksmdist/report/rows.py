"""Rows of any columns, for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, TextIO

from ksmdist.report.terminal import console, printable, table

__all__ = ["render_rows"]

_WIDEST = 200  # characters of a value


def render_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]], most: int, out: TextIO) -> None:
    """Print the first `most` rows as a table; values as query.json_value() makes them, null as -."""
    to = console(out)
    if not columns:
        to.out("no answer: the SQL asks for nothing")
        return
    rows = iter(rows)
    first = list(islice(rows, most))
    shown = table()
    for number, name in enumerate(columns):
        values = [row[number] for row in first if row[number] is not None]
        numeric = bool(values) and all(isinstance(value, int | float) for value in values)
        shown.add_column(printable(name, _WIDEST), justify="right" if numeric else "left", overflow="fold")
    for row in first:
        shown.add_row(*map(_cell, row))
    to.print(shown)
    if next(rows, None) is not None:
        to.out(f"... and more rows than {most}; --csv and --json have them all")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    return printable(value if isinstance(value, str) else json.dumps(value), _WIDEST)
