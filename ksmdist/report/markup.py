"""Text and tables as HTML: what comes from outside is escaped here, and nowhere else is markup made of it."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "NAME_BYTES",
    "behind",
    "chart",
    "counted",
    "embed",
    "escape",
    "grid",
    "listed",
    "paragraph",
    "plain",
    "section",
    "table",
]

NAME_BYTES = 120
"""Longest name shown, in bytes of UTF-8: with 10,000 images a page has to stay small whatever they are called."""

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_EXACT = (1 << 53) - 1  # what a number of JavaScript holds exactly


def plain(text: str, nbytes: int | None = NAME_BYTES) -> str:
    """A name as it can be shown: what is invisible or turns the writing round as \\uXXXX, the middle of a long one cut.

    nbytes: longest result in bytes of UTF-8, about; None: any length.
    """
    shown = "".join(_visible(sign) for sign in (text if nbytes is None else _ends(text, nbytes)))
    if nbytes is None or len(shown.encode()) <= nbytes:
        return shown
    head, tail = nbytes * 5 // 8, nbytes * 3 // 8 - 3
    raw = shown.encode()
    return raw[:head].decode(errors="ignore") + "…" + raw[-tail:].decode(errors="ignore")


def _ends(text: str, nbytes: int) -> str:
    """Enough of a very long text to cut the rest from."""
    return text if len(text) <= 2 * nbytes else text[:nbytes] + text[-nbytes:]


def _visible(sign: str) -> str:
    if unicodedata.category(sign) not in _HIDDEN:
        return sign
    return f"\\u{ord(sign):04x}" if ord(sign) < 0x10000 else f"\\U{ord(sign):08x}"


def escape(text: object) -> str:
    """Text for an element or a quoted attribute."""
    return html.escape(str(text), quote=True)


def embed(value: Any) -> str:
    """JSON that stands in a <script type="application/json">: no text in it can end the element.

    Whole numbers that JavaScript cannot hold exactly are decimal text.
    """
    text = json.dumps(_exact(value), separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_exact(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        return str(value)
    return value


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>\n"


def listed(texts: Iterable[str]) -> str:
    """A list of plain texts; nothing for none."""
    items = "".join(f"<li>{escape(text)}</li>\n" for text in texts)
    return f"<ul>\n{items}</ul>\n" if items else ""


def section(name: str, title: str, *parts: str) -> str:
    """A section of the page. name: its id; parts: markup."""
    body = "".join(parts)
    heading = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{heading}\n{body}</section>\n'


def chart(name: str, label: str) -> str:
    """Where the script draws a plot. label: what it is to who does not see it."""
    return f'<div class="chart script" data-chart="{name}" role="img" aria-label="{escape(label)}"></div>\n'


def behind(title: str, *parts: str) -> str:
    """Markup that is shown when asked for, and in print."""
    return f"<details>\n<summary>{escape(title)}</summary>\n{''.join(parts)}</details>\n"


def grid(name: str, caption: str, file: str) -> str:
    """Where the script puts a table that can be sorted and searched. file: where all its rows are."""
    return (
        f'<div class="grid" data-grid="{name}" data-caption="{escape(caption)}" data-file="{escape(file)}">'
        f'<p class="noscript">This table needs a script to show. Its rows are in {escape(file)}.</p></div>\n'
    )


def counted(number: int, what: str) -> str:
    """So many of them: `1 page`, `2 pages`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def table(
    caption: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    texts: int = 1,
    name: str = "",
    marked: Sequence[str] = (),
    trailing_texts: int = 0,
) -> str:
    """A table whose first column names the row.

    Whole numbers get thousands separators, None is `?`, all else is plain text. texts: columns from the left, and
    trailing_texts from the right, that are text; the others are aligned as numbers. name: its id. marked: a class a
    row, or nothing.
    """
    last = len(headings) - trailing_texts

    def numeric(place: int) -> str:
        return ' class="number"' if texts <= place < last else ""

    head = "".join(f'<th scope="col"{numeric(i)}>{escape(h)}</th>' for i, h in enumerate(headings))
    body = []
    for number, row in enumerate(rows):
        first, *rest = (_cell(value) for value in row)
        cells = "".join(f"<td{numeric(i)}>{value}</td>" for i, value in enumerate(rest, 1))
        mark = f' class="{escape(marked[number])}"' if number < len(marked) and marked[number] else ""
        body.append(f'<tr{mark}><th scope="row"{numeric(0)}>{first}</th>{cells}</tr>\n')
    identity = f' id="{name}"' if name else ""
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}">'
        f"<table{identity}>\n<caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody></table></div>\n"
    )


def _cell(value: object) -> str:
    if value is None:
        return '<span class="unknown" title="not known">?</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else escape(value)
