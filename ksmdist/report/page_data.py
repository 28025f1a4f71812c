"""What the report's page holds, computed from a run's tables: no text is made here, no file read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ksmdist.report.exposure import NO_TENANT
from ksmdist.report.markup import plain
from ksmdist.settings import Settings
from ksmdist.tables import KINDS
from ksmdist.whatif import accounting_of, best, present

__all__ = [
    "CELLS",
    "CURVE_POINTS",
    "PAGE_TABLES",
    "TOP_ROWS",
    "PageInput",
    "embedded",
    "huge_buckets",
    "split",
    "variety",
]

PAGE_TABLES: tuple[str, ...] = (
    "contents",
    "counters",
    "cumulative",
    "holes",
    "huge",
    "images",
    "ksm_stat",
    "passes",
    "policy",
    "spectrum",
    "spectrum_buckets",
    "whatif",
)
"""Tables that the page needs whole."""

CELLS = 64
"""Most cells along a side of the map of images: each is an element to draw, and a page has to open in 2 s."""
CURVE_POINTS = 1000
"""Most points of the cumulative curve."""
TOP_ROWS = 1000
"""Most rows of the tables that grow with the input, those of images apart."""


@dataclass(frozen=True, slots=True)
class PageInput:
    """What the page is made of.

    manifest: run.json as store.read_manifest() gives it; its keys summary, settings, identities, caveats, images,
              engine and ksmdist are shown
    tables:   those of PAGE_TABLES by name, each with the columns of tables.TABLES, in its order
    sharing:  table `sharing` in batches, in any number and of any size, read once: it grows with the square of the
              images. Only its columns image, other, contents, pages and other_pages are read
    exposure: what tenants would share, as summarize_exposure() gives it, of TOP_ROWS pairs at the most
    """

    manifest: Mapping[str, Any]
    tables: Mapping[str, pa.Table]
    sharing: Iterable[pa.RecordBatch]
    exposure: Mapping[str, Any]

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return int(self.manifest["settings"]["page_size"])

    @property
    def policy(self) -> list[dict[str, Any]]:
        """Table `policy`, without step `salt` where there is one salt, and it is step `all`."""
        return [row for row in self.rows("policy") if row["policy"] != "salt" or self.exposure["salts"] > 1]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A table's rows, for tables that do not grow with the input."""
        return list(self.tables[name].to_pylist())


Grid = dict[str, Any]
"""Columns of a table that the reader sorts and searches: `columns` (name, label, type), `data` (a list a column),
`total` (rows there are, where not all are here)."""


def embedded(page: PageInput) -> dict[str, Any]:
    """All that the page's script reads, as JSON values. Names are as plain() shows them; digests are cut to 8 bytes."""
    tables, settings = page.tables, Settings(**page.manifest["settings"])
    images = tables["images"]
    names = [plain(name) for name in images.column("image_id").to_pylist()]
    heat = _heat(page.sharing, images, names)
    pairs = heat.pop("pairs")
    return {
        "contents": _contents(tables["contents"]),
        "cumulative": _cumulative(tables["cumulative"]),
        "exposure": _exposure(page.exposure),
        "heat": heat,
        "huge": huge_buckets(tables["huge"]),
        "images": _images(images, tables["ksm_stat"], names),
        "page_size": settings.page_size,
        "pairs": pairs,
        "policy": [{name: row[name] for name in ("policy", "saved_bytes", "saved_pages")} for row in page.policy],
        "spectrum": [
            {name: row[name] for name in ("copies", "kind", "contents", "pages")}
            for row in tables["spectrum_buckets"].to_pylist()
        ],
        "split": split(tables["policy"], settings.page_size),
        "whatif": _whatif(tables["whatif"], settings),
    }


def split(policy: pa.Table, page_size: int) -> list[dict[str, Any]]:
    """What merging saves, by kind and by where: within is what merging in each image by itself saves, between the rest.

    Returns a row for each kind and scope (within, between) with pages and bytes; they add up to policy `all`.
    """
    rows = {row["policy"]: row for row in policy.to_pylist()}
    parts = []
    for kind in KINDS:
        within, whole = rows["image"][f"saved_{kind}"], rows["all"][f"saved_{kind}"]
        for scope, pages in (("within", within), ("between", whole - within)):
            parts.append({"kind": kind, "scope": scope, "pages": pages, "bytes": pages * page_size})
    return parts


def variety(spectrum: pa.Table) -> dict[str, int]:
    """How varied the pages are that are not zero and have a copy, over all nodes.

    Returns pages, contents, and how many of the most copied contents make half and nine tenths of the pages.
    """
    held = spectrum.filter(
        pc.and_(
            pc.is_null(spectrum.column("numa_node")),
            pc.and_(pc.not_equal(spectrum.column("kind"), "zero"), pc.greater_equal(spectrum.column("copies"), 2)),
        )
    )
    copies, contents = (held.column(name).to_numpy() for name in ("copies", "contents"))
    order = np.argsort(-copies, kind="stable")
    copies, contents = copies[order], contents[order]
    pages, count = np.cumsum(copies * contents), np.cumsum(contents)
    whole = int(pages[-1]) if len(pages) else 0
    found = {"pages": whole, "contents": int(count[-1]) if len(count) else 0}
    for name, tenths in (("half", 5), ("nine_tenths", 9)):
        wanted = -(-whole * tenths // 10)
        at = int(np.searchsorted(pages, wanted))
        if not whole:
            found[name] = 0
            continue
        before = int(pages[at - 1]) if at else 0
        found[name] = (int(count[at - 1]) if at else 0) + -(-(wanted - before) // int(copies[at]))
    return found


def huge_buckets(huge: pa.Table) -> list[dict[str, int]]:
    """Table huge over all images: a row a bucket, most pages that are zero or have a copy last."""
    names = ("frames", "huge_frames", "zero_frames", "pages", "mergeable_pages", "zero_pages")
    summed = huge.group_by("mergeable").aggregate([(name, "sum") for name in names]).sort_by("mergeable")
    return [
        {"mergeable": row["mergeable"]} | {name: row[f"{name}_sum"] for name in names} for row in summed.to_pylist()
    ]


def _column(name: str, label: str, type: str = "int", none: str = "?") -> dict[str, str]:
    """A column of a grid. type: int, bytes, mean, text or code; none: what stands for null."""
    return {"name": name, "label": label, "type": type} | ({} if none == "?" else {"none": none})


def _contents(contents: pa.Table) -> Grid:
    top = contents.slice(0, TOP_ROWS).to_pylist()
    columns: list[tuple[dict[str, str], Sequence[Any]]] = [
        (_column("rank", "rank"), [row["rank"] for row in top]),
        (_column("copies", "copies"), [row["copies"] for row in top]),
        (_column("what", "looks like", "text"), [_name(row["what"]) for row in top]),
        (_column("meaning", "what is known of it", "text", "-"), [_name(row["meaning"]) for row in top]),
        (_column("images", "images"), [row["images"] for row in top]),
        (_column("tenants", "tenants"), [row["tenants"] for row in top]),
        (_column("nodes", "nodes"), [row["nodes"] for row in top]),
        (_column("kind", "kind", "text"), [row["kind"] for row in top]),
        (_column("fill_word", "fill word", "code", "-"), [_hex(row["fill_word"], 16) for row in top]),
        (_column("first_image", "first image", "text"), [plain(row["first_image"]) for row in top]),
        (_column("first_address", "at address", "code"), [_hex(row["first_address"]) for row in top]),
        (_column("region", "mapping", "text", "-"), [_name(row["region"]) for row in top]),
        (_column("digest", "digest, first half", "code"), [row["digest"].hex()[:16] for row in top]),
    ]
    alone = {"tenants", "nodes"}  # of no interest where there is one
    shown = [(column, data) for column, data in columns if column["name"] not in alone or any(v != 1 for v in data)]
    return _grid(shown, len(contents))


def _images(images: pa.Table, ksm_stat: pa.Table, names: list[str]) -> Grid:
    known = np.array([row is not None for row in images.column("unreadable").to_pylist()], bool)

    def counted(label: str, *columns: str) -> tuple[dict[str, str], Sequence[Any]]:
        values = sum(images.column(column).to_numpy() for column in columns)
        assert isinstance(values, np.ndarray)
        return _column(columns[0], label), [int(v) if k else None for v, k in zip(values, known, strict=True)]

    def owned(label: str, column: str, type: str = "int") -> tuple[dict[str, str], Sequence[Any]]:
        values = ksm_stat.column(column).to_pylist()
        return _column(column, label, type), [v if k else None for v, k in zip(values, known, strict=True)]

    def told(column: str) -> tuple[dict[str, str], Sequence[Any]]:
        return _column(column, column, "text"), [plain(value, 48) for value in images.column(column).to_pylist()]

    scanned = images.column("scan_order").to_pylist()
    columns = [
        (_column("scan_order", "scan order"), scanned),
        (_column("image_id", "image", "text"), names),
        told("kind"),
        told("tenant"),
        told("host"),
        counted("pages", "total"),
        counted("zero", "zero"),
        counted("duplicate", "duplicate"),
        counted("unique", "unique"),
        counted("volatile", "volatile"),
        counted("not eligible", "ineligible"),
        counted("on the zero page already", "zero_mapped_fault", "zero_mapped_ksm"),
        counted("shared within", "shared_within"),
        counted("shared with others", "shared_with_others"),
        (_column("unreadable", "unreadable"), images.column("unreadable").to_pylist()),
        owned("ksm_merging_pages", "ksm_merging_pages"),
        owned("ksm_zero_pages", "ksm_zero_pages"),
        owned("ksm_process_profit", "ksm_process_profit", "bytes"),
    ]
    always = {"scan_order", "image_id", "total", "zero", "duplicate", "unique", "shared_within", "shared_with_others"}
    shown = [
        (column, data) for column, data in columns if column["name"] in always or any(v != 0 and v != "" for v in data)
    ]
    return _grid(shown, len(images))


def _exposure(found: Mapping[str, Any]) -> Grid:
    """Rows of the pairs of tenants that are most exposed to each other."""
    labels = {
        "contents": "contents both hold",
        "pages": "pages of the tenant",
        "other_pages": "pages of the other",
        "near_contents": "near max_page_sharing",
        "rare_contents": "rare: of these two only",
        "rare_pages": "rare, pages of the tenant",
        "rare_other_pages": "rare, pages of the other",
        "rare_looked_at": "rare, looked at",
        "rare_low": "low entropy",
        "rare_middle": "middle",
        "rare_high": "high",
        "rare_unknown": "not known",
        "salt_pages": "with salts, pages of the tenant",
        "salt_other_pages": "with salts, pages of the other",
    }
    if found["salts"] < 2:
        labels = {name: label for name, label in labels.items() if not name.startswith("salt_")}
    rows = [(pair, row) for pair in found["top"] for row in pair["kinds"]][:TOP_ROWS]
    columns: list[tuple[dict[str, str], Sequence[Any]]] = [
        (_column(name, label, "text"), [plain(pair[name] or NO_TENANT, 48) for pair, _ in rows])
        for name, label in (("tenant", "tenant"), ("other", "other tenant"))
    ]
    columns.append((_column("kind", "kind", "text"), [row["kind"] for _, row in rows]))
    columns += [(_column(name, label), [row[name] for _, row in rows]) for name, label in labels.items()]
    return _grid(columns, found["rows"])


def _cumulative(cumulative: pa.Table) -> Grid:
    count = len(cumulative)
    at = np.unique(np.linspace(0, count - 1, min(count, CURVE_POINTS)).round().astype(np.int64))
    rows = cumulative.take(pa.array(at)) if count else cumulative
    labels = {
        "pages": "pages it has",
        "zero": "zero pages",
        "contents_added": "contents it adds",
        "pages_known": "pages held before",
        "total_pages": "pages so far",
        "total_contents": "contents so far",
        "saved_pages": "saved so far",
    }
    columns: list[tuple[dict[str, str], Sequence[Any]]] = [
        (_column("image", "scan order"), rows.column("image").to_pylist()),
        (_column("image_id", "image", "text"), [plain(name) for name in rows.column("image_id").to_pylist()]),
        *((_column(name, label), rows.column(name).to_pylist()) for name, label in labels.items()),
    ]
    return _grid(columns, count)


def _heat(sharing: Iterable[pa.RecordBatch], images: pa.Table, names: list[str]) -> dict[str, Any]:
    """Cells of the map of images, and the pairs that share most, in one pass over the pairs.

    A cell has ordered pairs (image, other): its value is the mean, over all of these, of the image's pages whose
    content the other holds. With a cell for each image the diagonal is what an image holds twice; with several images
    in a cell it is what different images of the cell share.
    """
    count = len(images)
    side = min(count, CELLS)
    binned = side < count
    bin_of = np.arange(count, dtype=np.int64) * side // max(count, 1)
    tenants = np.unique(np.array(images.column("tenant").to_pylist(), object).astype(str), return_inverse=True)[1]
    pages, pairs = (np.zeros(side * side, np.float64) for _ in range(2))
    top = np.zeros((0, 5), np.int64)
    between, across = 0, 0
    for batch in sharing:
        image, other, contents, here, there = (
            batch.column(name).to_numpy(zero_copy_only=False).astype(np.int64)
            for name in ("image", "other", "contents", "pages", "other_pages")
        )
        apart = image != other
        between += int(apart.sum())
        across += int((tenants[image] != tenants[other]).sum())
        once = apart | (not binned)
        for row, column, value, kept in (
            (image, other, here, once),
            (other, image, there, apart),
        ):
            cell = bin_of[row[kept]] * side + bin_of[column[kept]]
            pages += np.bincount(cell, value[kept], side * side)
            pairs += np.bincount(cell, minlength=side * side)
        rows = np.stack([image, other, contents, here, there], axis=1)[apart]
        top = _most(np.concatenate([top, rows]))
    sizes = np.bincount(bin_of, minlength=side)
    possible = np.outer(sizes, sizes) - (np.diag(sizes) if binned else 0)
    mean = pages.reshape(side, side) / np.maximum(possible, 1)
    filled = np.argwhere(pairs.reshape(side, side) > 0)
    row, column = filled.T if len(filled) else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    first = np.searchsorted(bin_of, np.arange(side))
    last = np.searchsorted(bin_of, np.arange(side), side="right") - 1
    cells = [
        (_column("row", "row"), row.tolist()),
        (_column("column", "column"), column.tolist()),
        (_column("pages", "pages, mean of a pair" if binned else "pages", "mean"), mean[row, column].round(2).tolist()),
        (_column("pairs", "pairs that share"), pairs.reshape(side, side)[row, column].astype(np.int64).tolist()),
    ]
    labels = {
        "image": "image",
        "other": "other image",
    }
    columns: list[tuple[dict[str, str], Sequence[Any]]] = [
        (_column(name, label, "text"), [names[i] for i in top[:, place]])
        for place, (name, label) in enumerate(labels.items())
    ]
    columns += [
        (_column("contents", "contents both hold"), top[:, 2].tolist()),
        (_column("pages", "pages of the image"), top[:, 3].tolist()),
        (_column("other_pages", "pages of the other"), top[:, 4].tolist()),
    ]
    return {
        "across_tenants": across,
        "binned": binned,
        "cells": _grid(cells, len(filled)),
        "first": first.tolist(),
        "last": last.tolist(),
        "names": names if not binned else [],
        "pairs": _grid(columns, between),
        "side": side,
        "tenants": int(tenants.max()) + 1 if count else 0,
    }


def _most(rows: np.ndarray) -> np.ndarray:
    """The pairs with most pages of both, of equals the first in scan order."""
    weight = rows[:, 3] + rows[:, 4]
    if len(rows) > 4 * TOP_ROWS:
        least = np.partition(weight, len(weight) - TOP_ROWS)[len(weight) - TOP_ROWS]
        rows = rows[weight >= least]
        weight = rows[:, 3] + rows[:, 4]
    return rows[np.lexsort((rows[:, 1], rows[:, 0], -weight))][:TOP_ROWS]


def _whatif(grid: pa.Table, settings: Settings) -> dict[str, Any]:
    rows = grid.to_pylist()
    now, most = present(rows), best(rows, settings)
    limits = sorted({row["max_page_sharing"] for row in rows}, key=lambda limit: (limit is None, limit or 0))
    by: dict[object, set[object]] = {}
    for row in rows:
        knobs = row["accounting"], row["max_page_sharing"]
        by.setdefault(knobs, set()).add(tuple(v for k, v in row.items() if k not in ("merge_across_nodes", "present")))
    return {
        "accountings": {
            "off": "stable_tree",
            "on": list(dict.fromkeys(row["accounting"] for row in rows if row["use_zero_pages"])),
        },
        "best": rows.index(most),
        "kernel": settings.kernel,
        "kernel_accounting": accounting_of(replace(settings, use_zero_pages=True)),
        "limits": limits,
        "one_node": all(len(values) == 1 for values in by.values()),
        "present": rows.index(now),
        "rows": rows,
    }


def _grid(columns: Sequence[tuple[dict[str, str], Sequence[Any]]], total: int) -> Grid:
    return {"columns": [column for column, _ in columns], "data": [list(data) for _, data in columns], "total": total}


def _name(text: str | None) -> str | None:
    return None if text is None else plain(text)


def _hex(value: int | None, digits: int = 1) -> str | None:
    return None if value is None else f"0x{value:0{digits}x}"
