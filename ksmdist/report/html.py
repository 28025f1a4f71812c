"""The report as a page: one file that fetches nothing, holds no page bytes and is the same for the same run."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from string import Template
from typing import TextIO

from ksmdist.report.markup import counted, embed, escape, paragraph
from ksmdist.report.page_data import PAGE_TABLES, PageInput, embedded
from ksmdist.report.sections import GUIDE, filtered, incomplete, render_sections
from ksmdist.report.terminal import format_bytes, headline

__all__ = ["PAGE_TABLES", "PageInput", "render_html"]

_SCRIPTS = ("charts.js", "tables.js", "whatif.js", "page.js")  # in the order in which they need each other


def render_html(page: PageInput, out: TextIO) -> None:
    """Write the page, about 1 MB and 150 bytes an image, as UTF-8 text.

    What is in it is escaped; what runs in it are three scripts whose hashes its policy names, so that text that came
    out of an image can become no script. Reads page.sharing to its end.
    """
    data = embed(embedded(page))
    charts, script, style = _bundle(), _script(), _file("page.css")
    summary = page.manifest["summary"]
    images = len(page.tables["images"])
    total = summary["pages"]["total"]
    size = format_bytes(total * page.page_size)
    missing = "".join(paragraph(f"INCOMPLETE: {text}", "warning") for text in incomplete(page))
    missing += "".join(paragraph(text, "warning") for text in filtered(page))
    out.write(
        Template(_file("page.html")).substitute(
            policy=escape(
                f"default-src 'none'; script-src {_hash(charts)} {_hash(script)} {_hash(_EARLY)}; "
                f"style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
            ),
            style=style,
            early=_EARLY,
            description=escape(headline(summary)),
            what=escape(
                f"{counted(images, 'image')}, {size} in {counted(total, 'page')}, by the rules of Linux "
                f"{summary['settings']['kernel']}"
            ),
            missing=f'<div role="alert">\n{missing}</div>\n' if missing else "",
            guide=_guide(),
            sections=render_sections(page),
            data=data,
            charts=charts,
            script=script,
        )
    )


_EARLY = 'document.documentElement.className = "scripted";'  # before anything is drawn, so that nothing jumps


def _guide() -> str:
    """Who looks where."""
    items = []
    for reader, places in GUIDE:
        links = ", ".join(f'<a href="#{place}">{escape(name)}</a>' for place, name in places)
        items.append(f"<li><strong>{escape(reader)}:</strong> {links}</li>\n")
    return "".join(items)


def _file(name: str) -> str:
    return resources.files("ksmdist.report").joinpath("page", name).read_text(encoding="utf-8")


def _script() -> str:
    return _inline("\n".join(_file(name) for name in _SCRIPTS))


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script, which sets window.vegaEmbed."""
    import vl_convert

    return _inline(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _inline(script: str) -> str:
    """A script as it can stand in an element; raises ValueError where it would end it."""
    lower = script.lower()
    if "</script" in lower or "<!--" in lower:
        raise ValueError("a script holds the end of its own element")
    return script


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
