"""What KSM of Linux 6.11 and up counts, the slow way: mm/ksm.c page by page, scan by scan, in plain Python.

Written from the kernel's procedure, not from ksmdist's code: it is what that is tested against. With
huge pages (6.12 and up) pages_scanned is not exact, and of a content's equal pages another may be the
lone one: in the scan after a split the walk through the unstable tree may end at a page that is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

PAGE, ITEM, HUGE = 4096, 64, 512
ZERO_PAGE = -1  # the frame of what KSM maps to the shared zero page


def predict(processes: Sequence[Mapping[str, Any]], max_page_sharing: int, use_zero_pages: bool, smart_scan: bool,
            full_scans: int, merge_across_nodes: bool = True) -> dict[str, Any]:  # fmt: skip
    """processes: in scan order, as ksmdist.layouts.Process; of its fields only "layout" must be there."""
    content: dict[int, Any] = {}  # by frame
    whole: dict[int, tuple[int, int]] = {}  # by frame: the huge page it is in, until that is split
    locked: set[int] = set()  # frames
    orphans: set[int] = set()  # frames
    tables: list[list[int | None]] = []  # by process: the frame of each page
    for number, process in enumerate(processes):
        parent = process.get("forked_from")
        table: list[int | None] = []
        for at, letter in enumerate(process["layout"]):
            frame: int | None = None
            group = process["layout"][at // HUGE * HUGE :][:HUGE]
            huge = process.get("huge") and parent is None and len(group) == HUGE and group.strip(".r")
            if letter == "-" and parent is not None:
                frame = tables[parent][at]
            elif letter not in ".r" or huge or process.get("locked"):
                frame = len(content)
                letter, unique = "0" if letter in ".r" else letter, (number, at) if letter == "U" else None
                content[frame] = (letter, unique, None if merge_across_nodes else process.get("node"))
                whole |= {frame: (number, at // HUGE)} if huge else {}
                locked |= {frame} if process.get("locked") else set()
            table.append(frame)
        tables.append(table)

    def split(frame: int) -> bool:
        """Split its huge page, whose zeros are then no pages of their own; whether this one still is."""
        if (folio := whole.get(frame)) is not None:
            parts = {part for part, of in whole.items() if of == folio}
            gone = {part for part in parts if content[part][0] == "0"} - locked
            for part in parts:
                del whole[part]
            for table in tables:
                table[:] = [None if part in gone else part for part in table]
            return frame not in gone
        return True

    items: dict[tuple[int, int], dict[str, Any]] = {}
    node_of: dict[int, list[tuple[int, int]]] = {}  # by KSM frame: the places on it
    dups: dict[Any, list[int]] = {}  # by content: its KSM frames, head first
    scanned = skipped = 0
    for _ in range(full_scans):
        tree: dict[Any, tuple[tuple[int, int], int]] = {}
        for place in ((p, at) for p, table in enumerate(tables) for at in range(len(table))):
            frame = tables[place[0]][place[1]]
            if frame is None or frame == ZERO_PAGE:
                items.pop(place, None)
                continue
            item = items.setdefault(place, {"age": 0, "skips": 0, "old": None, "where": None})
            if smart_scan and frame not in node_of:
                age, item["age"] = item["age"], min(255, item["age"] + 1)
                if age >= 3 and item["skips"]:
                    item["skips"] -= 1
                    item["where"] = None
                    skipped += 1
                    continue
                if age >= 3:
                    item["skips"] = 1 if age <= 3 else 2 if age <= 5 else 4 if age <= 8 else 8
            scanned += 1
            if frame in node_of:  # merged, or shared by fork with a page that was: no limit then
                if item["where"] != frame:
                    item["where"] = frame
                    node_of[frame].append(place)
                continue
            item["where"], what = None, content[frame]
            room = next((dup for dup in dups.get(what, []) if len(node_of[dup]) < max_page_sharing), None)
            if item["old"] != what:
                item["old"] = what
            elif frame in orphans:
                pass
            elif use_zero_pages and what[0] == "0" and split(frame):
                tables[place[0]][place[1]] = ZERO_PAGE
            elif room is not None and split(frame):
                if len(node_of[room]) + 1 < max_page_sharing:
                    dups[what].sort(key=lambda dup: dup != room)  # to the head
                tables[place[0]][place[1]] = item["where"] = room
                node_of[room].append(place)
            elif room is not None:
                pass
            elif what not in tree:
                tree[what] = (place, frame)
                item["where"] = "tree"
            else:
                other, its = tree[what]
                if its == frame or tables[other[0]][other[1]] != its:
                    continue
                if whole.get(frame, 0) == whole.get(its, 1):
                    split(frame)
                elif split(frame) and split(its):
                    del tree[what]
                    tables[other[0]][other[1]] = items[other]["where"] = item["where"] = frame
                    node_of[frame] = [other, place]
                    dups.setdefault(what, []).insert(0, frame)
                elif tables[place[0]][place[1]] == frame:  # made a KSM page, then unmerged again: its twins stay one
                    orphans.add(frame)
                    tables[place[0]][place[1]] = len(content)
                    content[len(content)] = what
    shared, merged = len(node_of), sum(map(len, node_of.values()))
    unshared = sum(item["where"] == "tree" for item in items.values())
    per, zeros = Counter(p for p, _ in items), [table.count(ZERO_PAGE) for table in tables]
    on_ksm = Counter(p for p, at in items if isinstance(items[p, at]["where"], int))
    chains = [len(frames) for frames in dups.values() if len(frames) > 1]
    return {
        "counters": {
            "pages_shared": shared, "pages_sharing": merged - shared, "pages_unshared": unshared,
            "pages_volatile": len(items) - merged - unshared, "pages_scanned": scanned, "pages_skipped": skipped,
            "ksm_zero_pages": sum(zeros), "stable_node_chains": len(chains), "stable_node_dups": sum(chains),
            "general_profit": (merged - shared + sum(zeros)) * PAGE - len(items) * ITEM, "full_scans": full_scans,
        },
        "processes": [
            {"ksm_rmap_items": per[p], "ksm_zero_pages": zeros[p], "ksm_merging_pages": on_ksm[p],
             "ksm_process_profit": (on_ksm[p] + zeros[p]) * PAGE - per[p] * ITEM,
             "smaps_ksm_pages": sum(frame in node_of or frame in orphans for frame in table)}
            for p, table in enumerate(tables)
        ],
    }  # fmt: skip
