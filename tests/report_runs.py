"""Runs for the report's page: small ones, and made up ones of any size whose sums add up where the page adds them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import ksmdist
from ksmdist import store, streams
from ksmdist.report.exposure import summarize_exposure
from ksmdist.report.html import PAGE_TABLES, PageInput, render_html
from ksmdist.report.page_data import TOP_ROWS
from ksmdist.settings import Settings
from ksmdist.tables import ACCOUNTINGS, POLICIES, TABLES, WHATS

from .conftest import ZERO, page

Row = dict[str, Any]

FILL = b"\x6b" * 4096

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>alert(2)//",
    "abc\u202egnp.exe\u2066",
    "a\u2028b\u2029c\x07d\x00",
    "very-long-" + "name/" * 400,
    "&lt;b&gt; \"quoted\" 'too' {{x}} ${y}",
)
"""Names as an image could bring them."""


def table(name: str, rows: Sequence[Row]) -> pa.Table:
    """A table of the run; what a row does not have is 0, or null where that may be, or no text."""
    schema = TABLES[name].schema
    return pa.Table.from_pylist([_filled(row, schema) for row in rows], schema=schema)


def _filled(row: Row, schema: pa.Schema) -> Row:
    assert set(row) <= set(schema.names), set(row) - set(schema.names)
    filled = {}
    for field in schema:
        empty: Any = None
        if not field.nullable:
            empty = "" if pa.types.is_string(field.type) else False if pa.types.is_boolean(field.type) else 0
        filled[field.name] = row.get(field.name, empty)
    return filled


def made_up(images: int, partners: int = 40, names: Sequence[str] = (), several_passes: bool = False) -> PageInput:
    """A run of so many images of 24,640 pages, each of which shares with some `partners` that follow it.

    names: those of the first images. Table sharing is a stream, made anew for each PageInput.
    """
    random = np.random.default_rng(images)
    settings = Settings(shard_pages=16384, ranges=4, task_memory=1 << 30)
    size, each = settings.page_size, 24_640
    name = [names[i] if i < len(names) else f"web-{i:05d}.prod" for i in range(images)]
    zero = random.integers(4_000, 8_000, images)
    duplicate = random.integers(2_000, 9_000, images)
    same = random.integers(100, 900, images)
    total = each * images
    kinds = {"zero": int(zero.sum()), "same_filled": int(same.sum()), "other": int(duplicate.sum() - same.sum())}
    kept = {"zero": -(-kinds["zero"] // 256), "same_filled": images, "other": max(1, kinds["other"] // 9)}
    saved = {kind: kinds[kind] - kept[kind] for kind in kinds}
    within = {
        "zero": sum(int(z) - -(-int(z) // 256) for z in zero),
        "same_filled": saved["same_filled"] // 2,
        "other": saved["other"] // 3,
    }

    rungs = {
        "never": {},
        "zero": {"zero": saved["zero"]},
        "same_filled": {"zero": saved["zero"], "same_filled": saved["same_filled"]},
        "image": within,
        "tenant": {kind: (within[kind] + saved[kind]) // 2 for kind in saved},
        "salt": saved,
        "all": saved,
    }
    policy = []
    for level, rung in enumerate(POLICIES):
        row = {f"saved_{kind}": rungs[rung].get(kind, 0) for kind in saved}
        pages = sum(row.values())
        frames = sum(kept[kind] for kind in rungs[rung])
        policy.append(
            row
            | {
                "level": level,
                "policy": rung,
                "merged_pages": pages + frames,
                "frames_kept": frames,
                "saved_pages": pages,
            }
            | {"saved_bytes": pages * size, "saved_gib": pages * size / (1 << 30)}
            | {"cost_bytes": (sum(saved.values()) - pages) * size}
            | {"cost_gib": (sum(saved.values()) - pages) * size / (1 << 30)}
        )
    shared, sharing = sum(kept.values()), sum(saved.values())
    unshared = total - shared - sharing
    counters = {
        "pages_shared": shared,
        "pages_sharing": sharing,
        "pages_unshared": unshared,
        "rmap_items": total,
        "stable_node_chains": 3,
        "stable_node_dups": 31,
        "pages_skipped": 0,
        "ksm_zero_pages": 0,
        "general_profit": sharing * size - total * 64,
        "zero_merges": kinds["zero"],
        "content_merges": kinds["same_filled"] + kinds["other"],
        "saved_bytes": sharing * size,
    }
    counter_row = counters | {"volatile": "excluded", "page_size": size, "kernel": "6.18", "max_page_sharing": 256}
    counter_row |= {"merge_across_nodes": True}
    counter_rows = [counter_row]
    if several_passes:
        counter_rows.append(
            counter_row | {"volatile": "included", "pages_sharing": sharing + 10, "saved_bytes": (sharing + 10) * size}
        )
    tenants = [f"team-{i % 7}" for i in range(images)]
    image_rows = [
        {
            "scan_order": i,
            "image_id": name[i],
            "kind": "guest",
            "format": "raw",
            "tenant": tenants[i],
            "total": each,
            "bytes": each * size,
            "unreadable": 0,
            "zero": int(zero[i]),
            "duplicate": int(duplicate[i]),
            "unique": each - int(zero[i]) - int(duplicate[i]),
            "shared_within": int(duplicate[i]) // 3,
            "shared_with_others": int(duplicate[i]) // 2,
        }
        for i in range(images)
    ]
    stats = [
        {
            "image": i,
            "image_id": name[i],
            "ksm_rmap_items": each,
            "ksm_zero_pages": 0,
            "ksm_merging_pages": int(zero[i] + duplicate[i]),
            "ksm_process_profit": int(zero[i] + duplicate[i]) * size - each * 64,
        }
        for i in range(images)
    ]
    contents = [
        {
            "rank": rank,
            "digest": hashlib.blake2b(str(rank).encode(), digest_size=16).digest(),
            "kind": "zero" if rank == 1 else "same_filled" if rank < 9 else "other",
            "fill_word": 0 if rank == 1 else 0x6B6B6B6B6B6B6B6B + rank if rank < 9 else None,
            "what": None if rank == 20 else WHATS[0] if rank == 1 else WHATS[1] if rank < 9 else WHATS[2 + rank % 7],
            "meaning": "SLUB poison of a freed object" if rank == 4 else None,
            "copies": max(2, kinds["zero"] // rank**2),
            "images": min(images, 1 + 3000 // rank),
            "tenants": min(7, images),
            "nodes": 1,
            "first_image": name[rank % images],
            "first_address": rank * 65536,
            "region": names[rank % len(names)] if names else "[heap]" if rank % 3 else None,
        }
        for rank in range(1, 1001)
    ]
    spectrum: list[Row] = []
    buckets: list[Row] = []
    for copies, count, kind in (
        (1, unshared, "other"),
        (2, kinds["other"] // 8, "other"),
        (3, kinds["other"] // 9, "other"),
        (40, max(1, kinds["other"] // 200), "other"),
        (700, 3, "same_filled"),
        (kinds["zero"], 1, "zero"),
    ):
        spectrum.append({"kind": kind, "copies": copies, "frames": copies, "contents": count})
        bucket = 1 << (copies.bit_length() - 1)
        found = next((row for row in buckets if (row["copies"], row["kind"]) == (bucket, kind)), None)
        if found is None:
            found = {"copies": bucket, "kind": kind, "contents": 0, "pages": 0}
            buckets.append(found)
        found["contents"] += count
        found["pages"] += copies * count
    buckets.sort(key=lambda row: (row["copies"], row["kind"]))
    for row in buckets:
        row |= {"contents_bytes": row["contents"] * size, "pages_bytes": row["pages"] * size}
    known = (duplicate // 2 + zero - 1).clip(0)
    added = each - known
    cumulative = [
        {"image": i, "image_id": name[i], "pages": each, "zero": int(zero[i]), "contents_added": int(added[i])}
        | {"pages_known": int(known[i]), "total_pages": each * (i + 1), "total_contents": int(contents_so_far)}
        | {
            "saved_pages": each * (i + 1) - int(contents_so_far),
            "saved_bytes": (each * (i + 1) - int(contents_so_far)) * size,
        }
        for i, contents_so_far in enumerate(np.cumsum(added))
    ]
    huge = [
        {"image": i, "image_id": name[i], "mergeable": mergeable, "frames": 4 + mergeable % 7, "huge_frames": i % 2}
        | {
            "zero_frames": int(mergeable == 512),
            "pages": 512 * (4 + mergeable % 7),
            "mergeable_pages": mergeable * (4 + mergeable % 7),
        }
        | {"zero_pages": mergeable}
        for i in range(images)
        for mergeable in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    ]
    passes = [
        {"image": i, "image_id": name[i], "pass": number, "pages": each, "stable": each - 7 * number}
        | ({"changed": 7, "appeared": 1, "gone": 2} if number else {})
        for i in range(images if several_passes else 0)
        for number in range(2)
    ]
    summary = {
        "bounds": {"pages_shared": [shared - 1, shared + 9], "pages_sharing": [sharing - 9, sharing + 1]},
        "contents": {"distinct": unshared, "shared": kept["other"], "max_copies": 700},
        "counters": {n: counters[n] for n in ("pages_shared", "pages_sharing", "general_profit")},
        "engine": "inline",
        "engine_why": "made up",
        "estimate": {"full_scans": 2, "pages_per_scan": total, "seconds": total / 5000},
        "holes": {"images": [], "pages": 0, "ranges": 0},
        "filtered": [],
        "verified": {"verify": "hash", "contents": 10**9, "pages": 10**10, "unread": 0, "collided": 0},
        "kinds": kinds,
        "merges": {
            "zero": kinds["zero"],
            "content": kinds["same_filled"] + kinds["other"],
            "saved_bytes": sharing * size,
            "thp_zero": 0,
        },
        "pages": {"total": total, "absent": 0, "ineligible": 0, "zero_mapped_fault": 0, "zero_mapped_ksm": 0}
        | {"volatile": 0, "zero": kinds["zero"], "duplicate": int(duplicate.sum()), "unique": unshared},
        "physical": {"frames_saved": None, "profit": None},
        "run": "out",
        "settings": settings.as_dict(),
        "zero_colors": [{"color": 0, "zero": kinds["zero"], "zero_mapped_fault": 0}],
    }
    manifest = {
        "caveats": [],
        "engine": {"name": "inline", "why": "made up", "shards": images, "tasks": 1},
        "identities": [
            {"name": "pages = sum of classes", "left": total, "right": total, "holds": True},
            {"name": "saved = merged - frames kept", "left": sharing * size, "right": sharing * size, "holds": True},
        ],
        "images": [{"image_id": name[i], "tenant": tenants[i], "path": f"/images/{name[i]}"} for i in range(images)],
        "ksmdist": "0.1.0",
        "settings": settings.as_dict(),
        "summary": summary,
    }
    rows: dict[str, list[Row]] = {
        "contents": contents,
        "counters": counter_rows,
        "cumulative": cumulative,
        "holes": [],
        "huge": huge,
        "images": image_rows,
        "ksm_stat": stats,
        "passes": passes,
        "policy": policy,
        "spectrum": spectrum,
        "spectrum_buckets": buckets,
        "whatif": _grid(counters, kinds["zero"], size),
    }
    tables = {key: table(key, value) for key, value in rows.items()}
    exposed = summarize_exposure(manifest, exposure(sorted(set(tenants))), TOP_ROWS)
    return PageInput(manifest, tables, pairs(images, partners), exposed)


def exposure(tenants: list[str]) -> Iterator[pa.RecordBatch]:
    """Table exposure in batches of 5 rows: each two tenants share zero pages and others."""
    rows = []
    for at, tenant in enumerate(tenants):
        for more, other in enumerate(tenants[at + 1 :], 1):
            for kind in ("zero", "other"):
                row: Row = {"tenant": tenant, "other": other, "kind": kind, "contents": 90, "pages": 900}
                row |= {"other_pages": 700, "rare_contents": 10 * more, "rare_looked_at": 8, "rare_high": 5}
                rows.append(row | {"rare_low": 3, "rare_pages": 20, "rare_other_pages": 30})
    yield from table("exposure", rows).to_batches(5)


def _grid(counters: Row, zero: int, size: int) -> list[Row]:
    rows = []
    for accounting in ("stable_tree", *sorted(set(ACCOUNTINGS) - {"stable_tree"})):
        on = accounting != "stable_tree"
        for limit in (2, 16, 64, 256, 1024, 16384, None):
            for across in (False, True):
                lost = (zero + counters["content_merges"]) // (limit or 1 << 20) + (0 if across else 17)
                placed = zero if on else 0
                saved = counters["zero_merges"] + counters["content_merges"] - counters["content_merges"] // 9 - lost
                items = counters["rmap_items"] - placed
                rows.append(
                    {
                        "accounting": accounting,
                        "use_zero_pages": on,
                        "max_page_sharing": limit,
                        "merge_across_nodes": across,
                    }
                    | {
                        "pages_shared": lost,
                        "pages_sharing": saved - placed,
                        "pages_unshared": counters["pages_unshared"],
                    }
                    | {"rmap_items": items, "rmap_item_bytes": items * 64, "zero_merges": zero, "frames_kept": lost}
                    | {
                        "content_merges": counters["content_merges"],
                        "zero_pages_counted": None if accounting == "untracked" else placed,
                    }
                    | {"general_profit": saved * size - items * 64, "saved_bytes": saved * size}
                    | {"profit": saved * size - items * 64, "zero_pages_given_back": placed, "unmerge_frames": saved}
                    | {"present": not on and limit == 256 and across}
                )
    return rows


def pairs(images: int, partners: int) -> Iterator[pa.RecordBatch]:
    """Table sharing in batches: each image with itself and with the `partners` after it in scan order."""
    names = pa.array([f"{i}" for i in range(images)])
    for start in range(0, images, 500):
        image = np.repeat(np.arange(start, min(images, start + 500)), partners + 1)
        other = image + np.tile(np.arange(partners + 1), len(image) // (partners + 1))
        image, other = image[other < images], other[other < images]
        pages = 3000 // (1 + other - image) + (image * 7 + other * 3) % 50
        columns = [pa.array(image, pa.int32()), names.take(pa.array(image)), pa.array(other, pa.int32())]
        columns += [names.take(pa.array(other)), pa.array(pages // 2), pa.array(pages), pa.array(pages + 5)]
        yield pa.RecordBatch.from_arrays(columns, schema=TABLES["sharing"].schema)


def incomplete(page: PageInput) -> PageInput:
    """The same run with a hole, and an image that could not be reached."""
    summary = page.manifest["summary"] | {"holes": {"images": ["lost"], "pages": 12, "ranges": 1}}
    first = page.manifest["images"][0]["image_id"]
    holes = table(
        "holes",
        [
            {"image_id": first, "address": 0x7F0000000000, "pages": 12, "reason": "truncated"},
            {"image_id": "lost", "address": 0, "pages": None, "reason": "no_node"},
        ],
    )
    return replace(
        page, manifest=dict(page.manifest) | {"summary": summary}, tables=dict(page.tables) | {"holes": holes}
    )


def render(run: PageInput) -> str:
    out = io.StringIO()
    render_html(run, out)
    return out.getvalue()


def of_run(run: Path) -> PageInput:
    """What the command hands to the page."""
    return PageInput(
        store.read_manifest(run),
        {name: store.read_table(run, TABLES[name]) for name in PAGE_TABLES},
        streams.read_batches(run, TABLES["sharing"]),
        summarize_exposure(store.read_manifest(run), streams.read_batches(run, TABLES["exposure"]), TOP_ROWS),
    )


def number(text: str) -> int | None:
    return None if text == "?" else int(text.replace(",", ""))


def finished_run(place: Path) -> Path:
    """A run of four small images of two tenants that share, with a content of every kind."""
    shared = [page(number) for number in range(40)]
    contents = [
        [ZERO] * 300 + [FILL] * 20 + shared + [page(1000 + i) for i in range(200)],
        [ZERO] * 200 + [FILL] * 9 + shared * 2 + [page(2000 + i) for i in range(300)],
        [ZERO] * 10 + shared[:7] + [page(3000 + i // 2) for i in range(100)],
        [page(4000 + i) for i in range(50)],
    ]
    images = []
    for at, pages in enumerate(contents):
        (place / f"vm{at}.raw").write_bytes(b"".join(pages))
        images.append({"uri": str(place / f"vm{at}.raw"), "tenant": f"team-{at % 2}"})
    (place / "fleet.yaml").write_text(json.dumps({"images": images}))
    ksmdist.run([], place / "run", ksmdist.Settings(max_page_sharing=64), manifest=str(place / "fleet.yaml"))
    return place / "run"
