"""What changed from one run to another: one object, and its rendering for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import pyarrow as pa

from ksmdist.report.screen import what_it_is
from ksmdist.report.terminal import MAX_ROWS, console, filtered_lines, format_bytes, knobs, printable, table

__all__ = ["diff_summary", "render_diff"]

_SAID = {
    "came": "twice or more in B only",
    "went": "twice or more in A only",
    "gained": "more copies in B",
    "lost": "fewer copies in B",
    "moved": "as many, elsewhere",
    "alike": "the same in both",
}


def diff_summary(
    runs: tuple[str, str],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    sums: Mapping[str, Any],
    largest: pa.Table,
    images: pa.Table,
    contents: Sequence[pa.Table],
) -> dict[str, Any]:
    """The object `ksmdist diff --json` prints. Keys are a promise: they are added to, none goes.

    runs: where they are; a, b: run.json of both; sums: diff.Sums of each change; largest: rows of table diff_contents;
    images: table diff_images; contents: tables contents of B and A, for what the largest are. Digests
    are hexadecimal; bytes are copies x page size.
    """
    size = a["summary"]["settings"]["page_size"]
    known: dict[bytes, Mapping[str, Any]] = {}
    for rows in contents:
        for row in rows.to_pylist():
            known.setdefault(row["digest"], row)
    top = []
    for row in largest.to_pylist():
        of = known.get(row["digest"], {})
        top.append(row | {"digest": row["digest"].hex(), "what": of.get("what"), "meaning": of.get("meaning")})
    by_change: dict[str, int] = dict.fromkeys(("came", "went", "changed", "same"), 0)
    for change in images.column("change").to_pylist():
        by_change[change] += 1
    return {
        "a": _side(runs[0], a),
        "b": _side(runs[1], b),
        "page_size": size,
        "contents": {
            name: {
                "contents": of.contents,
                "copies_a": of.copies_a,
                "copies_b": of.copies_b,
                "copies_gained": of.gained,
                "bytes_gained": of.gained * size,
            }
            for name, of in sums.items()
        },
        "top_contents": top,
        "images": by_change,
        "changed_images": [row for row in images.to_pylist() if row["change"] != "same"],
    }


def _side(run: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    summary = manifest["summary"]
    holes = summary["holes"]
    return {
        "run": run,
        "complete": not (holes["ranges"] or holes["images"]),
        "saved_bytes": summary["merges"]["saved_bytes"],
        "volatile": summary["pages"]["volatile"],
        "filtered": summary["filtered"],
        "settings": summary["settings"],
    }


def render_diff(found: Mapping[str, Any], out: TextIO) -> None:
    """Print what changed: totals by change, the contents that changed most, images. found: as diff_summary() gives."""
    to = console(out)
    a, b, contents = found["a"], found["b"], found["contents"]
    gained = sum(of["bytes_gained"] for of in contents.values())
    changed = sum(of["contents"] for name, of in contents.items() if name != "alike")
    more = f"{format_bytes(abs(gained))} {'more' if gained > 0 else 'less'}" if gained else "as many"
    to.out(
        f"{changed:,} contents changed, {contents['alike']['contents']:,} are alike; B has {more} in contents held "
        "twice or more."
    )
    to.out(
        f"KSM would save {format_bytes(a['saved_bytes'])} in A ({printable(a['run'], 30)}), "
        f"{format_bytes(b['saved_bytes'])} in B ({printable(b['run'], 30)})."
    )
    for name, side in (("A", a), ("B", b)):
        if not side["complete"]:
            to.out(f"INCOMPLETE: pages of {name} could not be read: what went or came may be what was not read.")
        for line in filtered_lines(side["filtered"]):
            to.out(f"{name}: {line}")
        if side["volatile"]:
            to.out(f"{side['volatile']:,} pages of {name} changed between passes: they are in no stable tree.")
    if knobs(a["settings"]) != knobs(b["settings"]):
        for name, side in (("A", a), ("B", b)):
            to.out(f"settings of {name}: {knobs(side['settings'])}")
    shown = table()
    for heading in ("contents", "number", "copies in A", "copies in B", "gained", "bytes"):
        shown.add_column(heading, justify="left" if heading == "contents" else "right")
    shown.add_column("")
    for name, of in contents.items():
        counts = (f"{of[key]:,}" for key in ("contents", "copies_a", "copies_b"))
        shown.add_row(name, *counts, f"{of['copies_gained']:+,}", _signed(of["bytes_gained"]), _SAID[name])
    to.print(shown)
    to.out("A content with one copy is in no stable tree: - and 0 stand for one copy or none.")
    if found["top_contents"]:
        shown = table("copies gained or lost, most first")
        for heading in ("gained", "in A", "in B"):
            shown.add_column(heading, justify="right")
        shown.add_column("what it is", overflow="fold")
        shown.add_column("digest")
        shown.add_column("first place", overflow="fold")
        for row in found["top_contents"]:
            one, two = row["copies_a"], row["copies_b"]
            place = f"{printable(row['first_image'], 24)} {row['first_address']:#x}"
            shown.add_row(
                f"{(two or 0) - (one or 0):+,}",
                *("-" if copies is None else f"{copies:,}" for copies in (one, two)),
                what_it_is(row, 36),
                row["digest"][:8],
                place,
            )
        to.print(shown)
    _render_images(found, to)


def _render_images(found: Mapping[str, Any], to: Any) -> None:
    to.out("images: " + ", ".join(f"{count:,} {change}" for change, count in found["images"].items()))
    if not found["changed_images"]:
        return
    shown = table()
    shown.add_column("image", overflow="fold")
    shown.add_column("change")
    names = ("total", "zero", "duplicate", "unique", "shared_with_others")
    for name in names:
        shown.add_column(name.replace("shared_with_others", "with others"), justify="right")
    for row in found["changed_images"][:MAX_ROWS]:
        cells = []
        for name in names:
            one, two = row[f"{name}_a"], row[f"{name}_b"]
            if one is None or two is None:
                cells.append(f"{one if two is None else two:,}")
            else:
                cells.append(f"{two:,}" + (f" ({two - one:+,})" if two != one else ""))
        shown.add_row(printable(row["image_id"], 24), row["change"], *cells)
    to.print(shown)
    if len(found["changed_images"]) > MAX_ROWS:
        to.out(f"... and {len(found['changed_images']) - MAX_ROWS:,} images more; -o and --json have them all")


def _signed(nbytes: int) -> str:
    return f"+{format_bytes(nbytes)}" if nbytes > 0 else format_bytes(nbytes)
