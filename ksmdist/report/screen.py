"""A run's findings on one screen: 80 columns, 24 lines where there is one image."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, TextIO

from ksmdist.report.exposure import exposed_lines
from ksmdist.report.terminal import filtered_lines, format_bytes, knobs, percent, printable

__all__ = ["render_summary", "what_it_is"]

_WIDTH = 80
_BUCKETS = 6  # lines of the spectrum: the last has all that is above
_CONTENTS = 3
_PAIRS = 3
_CAVEATS = 5

_POLICIES = {
    "never": "nothing",
    "zero": "zero pages",
    "same_filled": "same-filled pages",
    "image": "within an image",
    "tenant": "within a tenant",
    "salt": "within a salt",
    "all": "everything",
}


def render_summary(found: Mapping[str, Any], out: TextIO) -> None:
    """Print what a run found: the headline, the split of what is saved, variety, policies, the most merged contents.

    found: as summary.summarize() gives it.
    """
    out.writelines(f"{line}\n" for line in _lines(found))


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines = _wrapped(found["headline"] + ("" if found["complete"] else " INCOMPLETE: see below."))
    for line in filtered_lines(found["filtered"]):
        lines += _wrapped(line)
    lines += _savings(found["savings"], found["settings"]["page_size"])
    lines.append("")
    lines += _side_by_side(_spectrum(found["spectrum_buckets"]), _policy(found))
    for part in (_contents(found["top_contents"]), _pairs(found["top_pairs"]), _exposure(found)):
        if part:
            lines += ["", *part]
    fault, thp = found["pages"]["zero_mapped_fault"], found["merges"]["thp_zero"]
    if fault or thp:
        said = f"zero pages besides: {fault:,} by read faults, which cost nothing"
        said += f"; {thp:,} freed as KSM splits huge pages, in no counter" if thp else ""
        lines += _wrapped(said)
    lines += _huge(found["huge"]) + _passes(found["passes"]) + _holes(found["holes"])
    for caveat in found["caveats"][:_CAVEATS]:
        lines.append(printable(f"note: {caveat}", _WIDTH))
    if len(found["caveats"]) > _CAVEATS:
        lines.append(f"... and {len(found['caveats']) - _CAVEATS:,} notes more; --json has them all")
    holds = sum(identity["holds"] for identity in found["identities"])
    failed = "" if holds == len(found["identities"]) else "FAILED: "
    lines += _wrapped(f"{failed}{holds} of {len(found['identities'])} identities hold; {knobs(found['settings'])}")
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False)


def _savings(savings: Mapping[str, int], page_size: int) -> list[str]:
    """What is saved by kind, and by whether one image holds what is merged or several."""
    total = savings["saved_pages"]
    if not total:
        return []
    parts = [("saved", total)]
    parts += [(name, savings[f"saved_{name.replace('-', '_')}"]) for name in ("zero", "same-filled", "other")]
    parts += [(f"{name} images", savings[f"{name}_images_saved_pages"]) for name in ("within", "between")]
    rows = [
        [name for name, _ in parts],
        [format_bytes(pages * page_size) for _, pages in parts],
        [percent(pages, total) for _, pages in parts],
    ]
    return _grid(rows, "rrrrrr", 3)


def _grid(rows: Sequence[Sequence[str]], sides: str, apart: int = 2) -> list[str]:
    """Rows, the first a heading, in columns; sides: a character a column, r for right-aligned and l for left."""
    widths = [max(len(row[number]) for row in rows) for number in range(len(sides))]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        )
        lines.append((" " * apart).join(cells).rstrip())
    return lines


def _ruled(lines: Sequence[str]) -> list[str]:
    """Lines with a rule below the heading."""
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _side_by_side(left: Sequence[str], right: Sequence[str]) -> list[str]:
    width = max(map(len, left))
    return [f"{one:<{width}}    {two}".rstrip() for one, two in zip_longest(left, right, fillvalue="")]


def _spectrum(buckets: Sequence[Mapping[str, Any]]) -> list[str]:
    """The spectrum as `zdb -S` prints it: how varied is what is not zero."""
    sums: dict[int, list[int]] = {}
    for row in buckets:
        if row["kind"] != "zero":
            at = min(row["copies"], 1 << (_BUCKETS - 1))
            total = sums.setdefault(at, [0, 0, 0])
            for number, name in enumerate(("contents", "pages", "pages_bytes")):
                total[number] += row[name]
    rows = [["copies", "contents", "pages", "size"]]
    for copies, counts in sorted(sums.items()):
        open_end = "+" if copies == 1 << (_BUCKETS - 1) else ""
        rows.append([f"{copies}{open_end}", f"{counts[0]:,}", f"{counts[1]:,}", format_bytes(counts[2])])
    counts = [sum(column) for column in zip(*sums.values(), strict=True)] or [0, 0, 0]
    rows.append(["not zero", f"{counts[0]:,}", f"{counts[1]:,}", format_bytes(counts[2])])
    return _ruled(_grid(rows, "rrrr"))


def _policy(found: Mapping[str, Any]) -> list[str]:
    rows = [["merging allowed for", "saves GiB"]]
    salted = found["exposure"]["salts"] > 1  # else it is all the same as everything
    shown = [row for row in found["policy"] if salted or row["policy"] != "salt"]
    rows += [[_POLICIES[row["policy"]], f"{row['saved_gib']:,.3f}"] for row in shown]
    return _ruled(_grid(rows, "lr"))


def _contents(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    if not contents:
        return []
    rows = [["most copies", "images", "what it is", "first place"]]
    for row in contents[:_CONTENTS]:
        place = f"{row['first_image']} {row['region'] or format(row['first_address'], '#x')}"
        rows.append([f"{row['copies']:,}", f"{row['images']:,}", what_it_is(row, 36), printable(place, 21)])
    return _grid(rows, "rrll")


def what_it_is(row: Mapping[str, Any], width: int) -> str:
    """A content in words: kind, fill_word, what and meaning as in table contents."""
    if row["kind"] == "zero":
        return "zero page"
    word = row["fill_word"]
    if word is not None:
        byte = word & 0xFF
        what = f"{byte:#04x}.." if word == byte * 0x0101010101010101 else f"{word:#018x}"
    else:
        what = "not read again" if row["what"] is None else row["what"].replace("_", " ")
    text = what + (f": {row['meaning']}" if row["meaning"] else "")
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 2]}.."


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not pairs:
        return []
    rows = [["sharing most", "with", "contents", "its pages", "other's"]]
    for row in pairs[:_PAIRS]:
        names = [printable(row[name], 20) for name in ("image_id", "other_id")]
        rows.append([*names, *(f"{row[name]:,}" for name in ("contents", "pages", "other_pages"))])
    return _grid(rows, "llrrr")


def _exposure(found: Mapping[str, Any]) -> list[str]:
    rows = exposed_lines(found["exposure"], found["policy"], _PAIRS)
    lines = _grid([row for row in rows if len(row) > 1], "llrrr") if rows and len(rows[0]) > 1 else []
    return lines + [line for row in rows if len(row) == 1 for line in _wrapped(row[0])]


def _huge(huge: Mapping[str, int]) -> list[str]:
    if not huge["frames"]:
        return []
    line = (
        f"{format_bytes(huge['frame_bytes'])} frames: {huge['mergeable_frames']:,} of {huge['frames']:,} have a page "
        f"that is zero or has a copy elsewhere; {huge['zero_frames']:,} are full of zeros"
    )
    if huge["huge_frames"]:
        line += f"; of {huge['huge_frames']:,} that are huge pages {huge['mergeable_huge_frames']:,} have one"
    return _wrapped(line)


def _passes(passes: Mapping[str, int] | None) -> list[str]:
    if passes is None:
        return []
    return _wrapped(
        f"volatile: of {passes['pages']:,} pages in the last of {passes['passes']:,} passes {passes['changed']:,} "
        f"changed since the one before, {passes['appeared']:,} are new, {passes['gone']:,} are gone; counted as if "
        f"they had not changed, {format_bytes(passes['saved_bytes_lost'])} more would be saved"
    )


def _holes(holes: Mapping[str, Any]) -> list[str]:
    lines = []
    if holes["pages"]:
        lines += _wrapped(
            f"INCOMPLETE: {holes['pages']:,} pages in {holes['ranges']:,} ranges could not be read and are not counted"
        )
    if holes["images"]:
        names = printable(", ".join(holes["images"][:3]) + (" ..." if len(holes["images"]) > 3 else ""), _WIDTH)
        lines += _wrapped(f"INCOMPLETE: {len(holes['images']):,} images were out of reach and are not counted: {names}")
    return lines
