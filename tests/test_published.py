"""Figures that others published, from image sets built to their counts: the arithmetic must add up to theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import ksmdist
from ksmdist import counters, identities, images
from ksmdist.images.base import BATCH_BYTES, Format, Hole, Image, ImageInfo, page_batch
from ksmdist.images.files import ImageFile
from ksmdist.policy import policy_table
from ksmdist.report.terminal import headline
from ksmdist.settings import Settings
from ksmdist.sharing import Sharing
from ksmdist.spectra import buckets_table, cumulative_table
from ksmdist.store import read_table
from ksmdist.tables import (
    CONTENTS,
    CUMULATIVE,
    HUGE,
    IMAGES,
    KINDS,
    POLICY,
    SCOPES,
    SHARING,
    SPECTRUM_BUCKETS,
    STABLE_TREE,
)
from ksmdist.tree import ALL_NODES
from ksmdist.whatif import grid

from .conftest import PAGE

GUEST = 131_072  # pages of 512 MiB
MAGIC = b"numbers\n"
WORDS = np.arange(1, PAGE // 8 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # no two are alike


class _Numbered:
    """A memory image of which the file has a number a page: 0 is a zero page, others differ in their first word."""

    def __init__(self, file: ImageFile, page_size: int) -> None:
        self._file = file
        self._number = np.frombuffer(file.read(0, file.nbytes), np.uint64)[1:]
        pages = len(self._number)
        self.info = ImageInfo(file.path, "numbered", "guest", page_size, pages, 0, file.nbytes, file.fingerprint)
        self.holes: tuple[Hole, ...] = ()

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        most = BATCH_BYTES // PAGE
        for at in range(start, end, most):
            number = self._number[at : min(at + most, end)]
            rows = np.repeat(WORDS[None], len(number), axis=0)
            rows[:, 0] = number
            rows[number == 0] = 0
            offsets = np.arange(0, (len(number) + 1) * PAGE, PAGE, dtype=np.int32)
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(rows)]
            content = pa.BinaryArray.from_buffers(pa.binary(), len(number), buffers)
            yield page_batch(np.arange(at, at + len(number)), content, PAGE)

    def find(self, address: np.ndarray) -> np.ndarray:
        page = (address // np.uint64(PAGE)).astype(np.int64)
        return np.where(page < self.info.pages, page, -1)

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        for page in pages.tolist():
            yield from self.batches(page, page + 1)

    def ranges(self) -> np.ndarray:
        return np.array([[0, self.info.pages * PAGE]], np.uint64)

    def close(self) -> None:
        self._file.close()


def _opened(file: ImageFile, page_size: int) -> Image:
    return _Numbered(file, page_size)


@pytest.fixture(autouse=True)
def _numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are made as they are read, so that gigabytes of guests need no disk; all else is the real flow."""
    numbered = Format("numbered", lambda head: head.startswith(MAGIC), _opened)
    monkeypatch.setattr(images, "FORMATS", (numbered, *images.FORMATS))


def run_of(folder: Path, guests: Mapping[str, Sequence[np.ndarray]], **knobs: Any) -> ksmdist.Run:
    """A run on images of these page numbers, with no limit to sharing."""
    paths = []
    for name, parts in guests.items():
        paths.append(folder / f"{name}.raw")
        paths[-1].write_bytes(MAGIC + np.concatenate(parts).astype(np.uint64).tobytes())
    return ksmdist.run(paths, folder / "out", Settings(max_page_sharing=None, **knobs), "inline")


def rows_of(run: ksmdist.Run, table: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_table(run.path, table).to_pylist()
    return found


def zeros(pages: int) -> np.ndarray:
    return np.zeros(pages, np.uint64)


def numbers(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.uint64)


def unique(image: int, count: int) -> np.ndarray:
    return numbers((image + 1) << 40, count)


def ladder_of(run: ksmdist.Run) -> dict[str, dict[str, Any]]:
    return {row["policy"]: row for row in rows_of(run, POLICY)}


def test_three_guests_of_512_mb(tmp_path: Path) -> None:
    """Difference Engine (OSDI'08): 50 % saved, 75.3 % of it by zero pages."""
    total, zero, sharable, contents, alone, frames = 393_120, 149_038, 52_436, 3_577, 191_646, 195_224
    assert zero + sharable + alone == total
    zero_of, alone_of = [49_679, 49_679, 49_680], [63_882, 63_882, 63_882]
    # 52,436 pages with 3,577 contents: all three have each content once, and some of them again and again.
    again = numbers(1, 3 * contents + sharable).astype(np.int64) % contents
    pages_of = [(again[part::3] + 1).astype(np.uint64) for part in range(3)]
    sizes = [total // 3 - z - a for z, a in zip(zero_of, alone_of, strict=True)]
    assert sum(sizes) == sharable
    guests = {
        f"vm{n}": [
            zeros(zero_of[n]),
            np.concatenate([numbers(1, contents), pages_of[n]])[: sizes[n]],
            unique(n, alone_of[n]),
        ]
        for n in range(3)
    }
    run = run_of(tmp_path, guests)

    pages: Any = run.summary["pages"]
    assert {name: pages[name] for name in ("total", "zero", "duplicate", "unique")} == {
        "total": total,
        "zero": zero,
        "duplicate": sharable,
        "unique": alone,
    }
    assert run.summary["contents"]["distinct"] == contents + alone
    assert run.summary["contents"]["shared"] == contents
    saved = total - frames
    assert run.summary["merges"]["saved_bytes"] == saved * PAGE
    assert (1000 * saved + total // 2) // total == 503
    assert "(50.3 %)" in headline(run.summary)

    ladder = ladder_of(run)
    assert ladder["all"]["saved_pages"] == saved == 197_896
    assert ladder["all"]["frames_kept"] == contents + 1
    assert ladder["all"]["saved_zero"] == ladder["zero"]["saved_pages"] == zero - 1
    assert (1000 * ladder["all"]["saved_zero"] + saved // 2) // saved == 753
    assert ladder["all"]["saved_other"] == sharable - contents
    assert total - ladder["all"]["saved_pages"] == frames

    buckets = rows_of(run, SPECTRUM_BUCKETS)
    assert sum(row["pages"] for row in buckets) == total
    assert sum(row["contents"] for row in buckets) == frames
    (zero_bucket,) = [row for row in buckets if row["kind"] == "zero"]
    assert (zero_bucket["copies"], zero_bucket["contents"], zero_bucket["pages"]) == (131_072, 1, zero)
    ones = [row for row in buckets if row["copies"] == 1]
    assert [(row["kind"], row["contents"], row["pages"]) for row in ones] == [("other", alone, alone)]

    last = rows_of(run, CUMULATIVE)[-1]
    assert (last["total_pages"], last["total_contents"], last["saved_pages"]) == (total, frames, saved)
    assert last["saved_bytes"] == saved * PAGE
    first = rows_of(run, CUMULATIVE)[0]
    assert (first["pages"], first["zero"], first["pages_known"]) == (total // 3, zero_of[0], 0)
    assert first["contents_added"] == 1 + contents + alone_of[0]
    pairs = {(row["image"], row["other"]): row["contents"] for row in rows_of(run, SHARING)}
    assert {pairs[pair] for pair in ((0, 1), (0, 2), (1, 2))} == {contents}
    assert sum(row["pages"] for row in rows_of(run, HUGE)) == total
    assert rows_of(run, CONTENTS)[0]["copies"] == zero
    assert sum(row["copies"] for row in rows_of(run, STABLE_TREE)) == zero + sharable


def test_a_production_host_of_64_gb() -> None:
    """36 processes: pages_shared 125,446, pages_sharing 5,259,506, general_profit 20.6 GB."""
    shared, sharing_pages, processes = 125_446, 5_259_506, 36
    merged = shared + sharing_pages
    # 5,259,506 pages less 64 bytes an rmap item are 20.6 GB with 14,733,384 items: 9,348,432 pages found no partner.
    items = (sharing_pages * PAGE - 20_600_000_000) // 64
    alone = items - merged
    assert (items, alone) == (14_733_384, 9_348_432)
    assert items * PAGE < 64 * 2**30
    # Contents with 42 or 43 copies, one in each process and the rest in the last; none needs a second KSM page.
    more = merged - 42 * shared
    by_image = []
    held = np.zeros((processes, 3), np.int64)  # duplicate, unique, those of contents held twice
    for copies, count in ((42, shared - more), (43, more)):
        for process in range(processes):
            here = 1 if process < processes - 1 else copies - (processes - 1)
            by_image.append((ALL_NODES, process, copies, process, here, -1, count))
            held[process, 0] += here * count
            held[process, 2] += here * count if here > 1 else 0
    for process in range(processes):
        count = alone // processes + (process < alone % processes)
        by_image.append((ALL_NODES, process, 1, 0, 1, -1, count))
        held[process, 1] = count
    together = [(1, alone), (42, shared - more), (43, more)]
    spectrum = [
        (node, KINDS.index("other"), copies, copies, count) for node in (ALL_NODES, 0) for copies, count in together
    ]
    rows = [
        dict.fromkeys(IMAGES.schema.names, 0)
        | {
            "scan_order": n,
            "image_id": f"process-{n:02d}",
            "kind": "process",
            "format": "arrow",
            "producer": "",
            "filter_level": "",
            "host": "",
            "tenant": "",
        }
        | {"total": int(held[n, :2].sum()), "bytes": int(held[n, :2].sum()) * PAGE}
        | {"duplicate": int(held[n, 0]), "unique": int(held[n, 1]), "kind_other": int(held[n, :2].sum())}
        | {"shared_within": int(held[n, 2]), "shared_with_others": int(held[n, 0])}
        for n in range(processes)
    ]
    within = [(7, shared - more), (8, more), (1, alone + (processes - 1) * shared)]  # copies in one process, contents
    scopes = [
        (node, SCOPES.index(scope), KINDS.index("other"), copies, count)
        for node in (ALL_NODES, 0)
        for scope, found in (("image", within), ("tenant", together), ("all", together))
        for copies, count in found
    ]
    sharing = Sharing(
        images=pa.Table.from_pylist(rows, schema=IMAGES.schema),
        region_names=(),
        spectrum=np.array(spectrum),
        image_spectrum=np.array(by_image),
        scopes=np.array(scopes),
        patterns=(),
    )
    settings = Settings()
    prediction = counters.predict(sharing, settings)
    found = prediction.counters
    assert (found.pages_shared, found.pages_sharing, found.rmap_items) == (shared, sharing_pages, items)
    assert found.general_profit == sharing_pages * PAGE - items * 64 == 20_600_000_000
    assert (found.pages_unshared, found.pages_volatile, found.stable_node_chains) == (alone, 0, 0)
    # Nobody said in which huge pages they are: as if in one.
    frame = dict.fromkeys(HUGE.schema.names, 0) | {"image_id": "process-00", "frames": 1, "pages": items}
    tables = {
        POLICY.name: policy_table(sharing, settings),
        SPECTRUM_BUCKETS.name: buckets_table(sharing, PAGE),
        CUMULATIVE.name: cumulative_table(sharing, PAGE),
        HUGE.name: pa.Table.from_pylist([frame], schema=HUGE.schema),
    }
    assert all(one.holds for one in identities.check(sharing, prediction, settings, merged, items, 0, tables))

    stats = counters.ksm_stat_table(prediction, sharing, settings).to_pylist()
    assert len(stats) == processes
    assert sum(row["ksm_merging_pages"] for row in stats) == merged
    assert sum(row["ksm_rmap_items"] for row in stats) == items
    assert sum(row["ksm_process_profit"] for row in stats) == found.general_profit + shared * PAGE
    table = grid(sharing, settings).to_pylist()
    (present,) = [row for row in table if row["present"]]
    assert present["general_profit"] == present["profit"] == found.general_profit
    assert present["saved_bytes"] == sharing_pages * PAGE
    ladder = {row["policy"]: row for row in tables[POLICY.name].to_pylist()}
    assert ladder["all"]["saved_pages"] == ladder["tenant"]["saved_pages"] == sharing_pages
    assert ladder["all"]["frames_kept"] == shared
    assert ladder["image"]["saved_pages"] == 6 * (shared - more) + 7 * more
    assert ladder["same_filled"]["saved_pages"] == 0
    (ones, of_32) = tables[SPECTRUM_BUCKETS.name].to_pylist()
    assert (ones["copies"], ones["contents"], of_32["copies"]) == (1, alone, 32)
    assert (of_32["contents"], of_32["pages"]) == (shared, merged)
    last = tables[CUMULATIVE.name].to_pylist()[-1]
    assert (last["total_pages"], last["saved_pages"]) == (items, sharing_pages)
    # Without the limit nothing changes: no content has more than 43 copies.
    assert {row["general_profit"] for row in table if row["max_page_sharing"] in (64, 256, None)} == {20_600_000_000}


ZERO_PAGES, WITHIN = 41_705, 3_254  # of each guest; contents that it has twice


@pytest.mark.parametrize(
    ("guests", "between", "saved", "printed"),
    [
        (1, 0, 44_958, "34.3 %"),
        (2, 44_825, 134_742, "51.4 %"),
        (2, 59_505, 149_422, "57.0 %"),
        (2, 21_232, 111_149, "42.4 %"),
    ],
    ids=["one", "same-workload", "same-without-aslr", "other-workload"],
)
def test_guests_of_debian_12(guests: int, between: int, saved: int, printed: str, tmp_path: Path) -> None:
    """QEMU, 512 MiB each. Published: the zero pages of one, and the share saved of each set."""
    made = {}
    for n in range(guests):
        twice = unique(n + 10, WITHIN)
        rest = GUEST - ZERO_PAGES - 2 * WITHIN - between
        made[f"vm{n}"] = [zeros(ZERO_PAGES), twice, twice, numbers(1, between), unique(n, rest)]
    run = run_of(tmp_path, made)
    total, zero = guests * GUEST, guests * ZERO_PAGES
    assert saved == zero - 1 + guests * WITHIN + (between if guests == 2 else 0)
    pages: Any = run.summary["pages"]
    assert (pages["total"], pages["zero"], pages["duplicate"]) == (total, zero, guests * (2 * WITHIN + between))
    assert run.summary["merges"]["saved_bytes"] == saved * PAGE
    assert f" ({printed})" in headline(run.summary)
    ladder = ladder_of(run)
    assert ladder["all"]["saved_pages"] == saved
    assert ladder["zero"]["saved_pages"] == zero - 1
    assert ladder["image"]["saved_pages"] == guests * (ZERO_PAGES - 1 + WITHIN)
    assert rows_of(run, CUMULATIVE)[-1]["saved_pages"] == saved
    # The only frames of 2 MiB that are alike are those full of zero pages.
    assert sum(row["zero_frames"] for row in rows_of(run, HUGE)) == guests * (ZERO_PAGES // 512)


def test_sharing_without_zero_pages_is_mostly_inside_one_machine(tmp_path: Path) -> None:
    """ATC'12: under 15 % without zero pages, over 90 % of it inside one machine."""
    machines, zero, inside, between, alone = 4, 3_000, 450, 100, 5_900
    made = {}
    for n in range(machines):
        thrice = unique(n + 10, inside)
        made[f"host{n}"] = [zeros(zero), thrice, thrice, thrice, numbers(1, between), unique(n, alone)]
    run = run_of(tmp_path, made)
    other = machines * (3 * inside + between + alone)
    ladder = ladder_of(run)
    everywhere, within = (ladder[name]["saved_same_filled"] + ladder[name]["saved_other"] for name in ("all", "image"))
    assert within == machines * 2 * inside == 3_600
    assert everywhere == within + (machines - 1) * between == 3_900
    assert run.summary["pages"]["total"] - run.summary["pages"]["zero"] == other == 29_400
    assert 100 * everywhere < 15 * other
    assert 100 * within > 90 * everywhere
    assert ladder["image"]["saved_zero"] == machines * (zero - 1)
    assert ladder["all"]["saved_zero"] == machines * zero - 1
    within_pages = sum(row["pages"] for row in rows_of(run, SHARING) if row["image"] == row["other"])
    assert within_pages == machines * 3 * inside
    assert sum(row["shared_within"] for row in rows_of(run, IMAGES)) == within_pages
