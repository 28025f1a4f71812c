"""What an image is, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from ksmdist.report.terminal import MAX_ROWS, format_bytes, printable

__all__ = ["render_info"]


def render_info(found: Mapping[str, Any], out: TextIO) -> None:
    """Print an image. found: as images.description.describe() gives it."""
    size = found["page_size"]
    packed = f", {format_bytes(found['unpacked'])} unpacked" if found["unpacked"] else ""
    excluded = f"{found['pages_excluded']:,} of the absent ones"
    if found["filter_level"] and not found["pages_excluded"]:
        excluded = "not known: the image does not say how many"
    lines = [
        ("format", f"{found['format']} of a {found['kind']}" + (f", by {found['producer']}" * bool(found["producer"]))),
        ("size", f"{format_bytes(found['nbytes'])}{packed}; pages of {size:,} bytes"),
        ("present", f"{found['pages']:,} pages, {format_bytes(found['pages'] * size)}"),
        ("absent", f"{found['pages_absent']:,} pages"),
        ("excluded", excluded),
        ("filter", found["filter_level"] or "none"),
    ]
    lines += [(name, found[name]) for name in ("image_id", "host", "tenant") if found[name]]
    lines += [("base", path) for path in found["base"]]
    lines += [("with", path) for path in found["files"][:MAX_ROWS] if path not in found["base"]]
    ranges, holes = found["ranges"], found["holes"]
    for number, (start, end) in enumerate(ranges[:MAX_ROWS]):
        lines.append(
            ("" if number else "addresses", f"{start:#014x} to {end:#014x}  {(end - start) // size:>12,} pages")
        )
    if len(ranges) > MAX_ROWS:
        lines.append(("", f"... and {len(ranges) - MAX_ROWS:,} ranges more; --json has them all"))
    for number, hole in enumerate(holes[:MAX_ROWS]):
        lines.append(("" if number else "holes", f"{hole['address']:#014x}  {hole['pages']:,} pages {hole['reason']}"))
    if len(holes) > MAX_ROWS:
        lines.append(("", f"... and {len(holes) - MAX_ROWS:,} holes more; --json has them all"))
    out.write(f"{printable(found['path'])}\n")
    out.writelines(f"  {name:<10} {printable(text)}\n" for name, text in lines)
    for number, sentence in enumerate(found["meaning"]):
        out.write(f"  {'' if number else 'counts':<10} {printable(sentence)}\n")
