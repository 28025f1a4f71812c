"""Layouts of processes as memory images, without a kernel: one string a process, as in kernel-truth.jsonl.

`0` zero page, `.` untouched, `r` read-touched, `U` unique, `-` shared with the parent, else a page of that letter.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ksmdist.tables import PAGE_FLAGS

from .conftest import PAGE, ZERO, Row, arrow_image

MARKED = PAGE_FLAGS["eligible"]


def layout_images(folder: Path, processes: Sequence[Mapping[str, Any]], batch: int = 16) -> list[Path]:
    """An Arrow image a process, named so that their order is not the order of their names."""
    frames: list[list[tuple[bytes, int, int] | None]] = []
    paths, taken = [], 0
    for number, process in enumerate(processes):
        found: list[tuple[bytes, int, int] | None] = []
        node = process.get("node") or 0
        rows: list[Row] = []
        for at, letter in enumerate(process["layout"]):
            page: tuple[bytes, int, int] | None = None
            if letter == "-":
                page = frames[process["forked_from"]][at]
            elif letter not in ".r":
                taken += 1
                unique = struct.pack("<QQ", taken, ~taken & 0xFFFFFFFF) * (PAGE // 16)
                page = (ZERO if letter == "0" else unique if letter == "U" else letter.encode() * PAGE, taken, node)
            found.append(page)
            region = "[heap]" if at % 2 else "[stack]"
            if page is not None:
                rows.append((at * PAGE, page[0], MARKED, page[1], region, page[2]))
            elif letter == "r" or (letter == "-" and processes[process["forked_from"]]["layout"][at] == "r"):
                rows.append((at * PAGE, None, MARKED | PAGE_FLAGS["zero_mapped"], None, region, 0))
        frames.append(found)
        path = folder / f"process-{len(processes) - number}.arrow"
        metadata = {"ksmdist.kind": "process", "ksmdist.scan_order": str(100 + number)}
        paths.append(arrow_image(path, rows, metadata, batch))
    return paths
