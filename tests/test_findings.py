"""The tables that analysts open, against the slow way; and the identities between tables, on any run."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist.layouts import random_experiment
from ksmdist.settings import Settings
from ksmdist.store import read_table
from ksmdist.tables import (
    CHECKSUMS,
    CLASSES,
    CONTENTS,
    COUNTERS,
    CUMULATIVE,
    HUGE,
    IMAGES,
    KINDS,
    KSM_STAT,
    PAGE_FLAGS,
    PASSES,
    POLICY,
    POLICY_SPECTRUM,
    SHARING,
    SPECTRUM,
    SPECTRUM_BUCKETS,
    STABLE_TREE,
    WHATIF,
)

from . import findings_oracle as oracle
from .conftest import PAGE, ZERO, arrow_image, page
from .findings_oracle import Image, Page
from .layouts import layout_images

FRAME_PAGES = 512
POOL = [ZERO, b"\xff" * PAGE, b"\x6b" * PAGE, *(page(n) for n in range(5))]
ALONE = [page(100 + n) for n in range(40)]
SLOTS = [(frame, place) for frame in range(4) for place in (0, 1, 2, 100, 511)]

CAREFUL = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),  # to explain takes as long again
)


@st.composite
def fleets(draw: st.DrawFn, thp: bool = True, nodes: int = 2) -> list[Image]:
    """One to four images of few contents, in some frames of the size of a huge page; some of unique ones too."""
    alone = iter(ALONE)
    images = []
    for number in range(draw(st.integers(1, 4))):
        marked = draw(st.sets(st.integers(0, 4))) if thp else set()
        pages = []
        for frame, place in sorted(draw(st.sets(st.sampled_from(SLOTS), max_size=12))):
            code = draw(st.integers(0, len(POOL)))
            content = POOL[code] if code < len(POOL) else next(alone)
            may = draw(st.integers(0, 7)) > 0
            node = draw(st.integers(0, nodes - 1))
            placed = content is ZERO and draw(st.booleans())
            pages.append(Page((frame * FRAME_PAGES + place) * PAGE, content, may, frame in marked, node, placed))
        if draw(st.integers(0, 9)) == 9:
            pages += [Page((4 * FRAME_PAGES + at) * PAGE, ZERO, thp=4 in marked) for at in range(FRAME_PAGES)]
        images.append(Image(f"image{number}", draw(st.sampled_from(["", "a", "b"])), pages))
    return images


@st.composite
def knobs(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "use_zero_pages": draw(st.booleans()),
        "max_page_sharing": draw(st.sampled_from([2, 3, 4, 7, 256, None])),
        "merge_across_nodes": draw(st.booleans()),
        "shard_pages": draw(st.sampled_from([7, 40, None])),
        "ranges": draw(st.sampled_from([1, 4, 16])),
        "contents": draw(st.sampled_from([0, 1, 3, 1000])),
    }


def written(path: Path, image: Image, batch: int = 100) -> Path:
    rows = []
    for at in image.pages:
        named = [name for name in ("eligible", "thp", "placed") if getattr(at, name)]
        bits = {"thp": ("huge",), "placed": ("zero_mapped", "pte_dirty")}
        flags = sum(PAGE_FLAGS[flag] for name in named for flag in bits.get(name, (name,)))
        rows.append((at.address, None if at.placed else at.content, flags, None, None, at.node))
    metadata = {"ksmdist.image_id": image.image_id, "ksmdist.tenant": image.tenant}
    return arrow_image(path, rows, metadata, batch)


def rows_of(run: ksmdist.Run, table: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_table(run.path, table).to_pylist()
    return found


def check_oracle(run: ksmdist.Run, images: Sequence[Image]) -> None:
    """Every table of findings equals the oracle's, in rows, columns and order."""
    wanted = run.settings
    places = oracle.held(images)
    contents = rows_of(run, CONTENTS)
    expected = oracle.contents(places, images)[: wanted.contents]
    assert [{name: row[name] for name in expected[0]} for row in contents] == expected if expected else not contents
    for row in contents:
        named = {"zero": "zero", "same_filled": "fill_word"}.get(row["kind"])
        assert row["what"] == named if named else row["what"] not in ("zero", "fill_word", None)
    assert rows_of(run, SHARING) == oracle.sharing(places, images)
    assert rows_of(run, POLICY) == oracle.policy(places, images, wanted)
    buckets = rows_of(run, SPECTRUM_BUCKETS)
    assert [row["copies"] for row in buckets] == sorted(row["copies"] for row in buckets)
    in_order = sorted(buckets, key=lambda row: (row["copies"], row["kind"]))
    assert in_order == oracle.spectrum_buckets(places, PAGE)
    assert rows_of(run, CUMULATIVE) == oracle.cumulative(places, images, PAGE)
    assert rows_of(run, HUGE) == oracle.huge(places, images, PAGE)
    spectrum = rows_of(run, POLICY_SPECTRUM)
    expected = oracle.policy_spectrum(places, images)
    assert sorted(spectrum, key=_spectrum_order) == sorted(expected, key=_spectrum_order)


def _spectrum_order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    node = row["numa_node"]
    return (-1 if node is None else node, row["scope"], row["kind"], row["copies"])


def check_identities(run: ksmdist.Run, forks: bool = False) -> None:
    """Sums between the tables of a run, whatever is in it."""
    images = rows_of(run, IMAGES)
    size, across = run.settings.page_size, run.settings.merge_across_nodes
    counters = rows_of(run, COUNTERS)
    counted = counters[0]
    assert counted["volatile"] == "excluded"
    total: Counter[str] = Counter()
    for image in images:
        assert image["total"] == sum(image[name] for name in CLASSES)
        assert image["bytes"] == image["total"] * size
        assert image["shared_within"] <= image["duplicate"]
        assert image["shared_with_others"] <= image["duplicate"]
        total.update({name: value for name, value in image.items() if isinstance(value, int)})
    candidates = sum(total[name] for name in ("zero", "zero_mapped_ksm", "duplicate", "unique"))
    zeros = total["zero"] + total["zero_mapped_ksm"]

    spectrum = [row for row in rows_of(run, SPECTRUM) if row["numa_node"] is None]
    assert sum(row["copies"] * row["contents"] for row in spectrum) == candidates
    tree = rows_of(run, STABLE_TREE)
    several = [row for row in spectrum if row["copies"] >= 2]
    assert sum(row["copies"] for row in tree) == sum(row["copies"] * row["contents"] for row in several)
    assert len(tree) == sum(row["contents"] for row in several)
    buckets = rows_of(run, SPECTRUM_BUCKETS)
    for kind in KINDS:
        of_kind = [row for row in spectrum if row["kind"] == kind]
        mine = [row for row in buckets if row["kind"] == kind]
        assert sum(row["contents"] for row in mine) == sum(row["contents"] for row in of_kind)
        assert sum(row["pages"] for row in mine) == sum(row["copies"] * row["contents"] for row in of_kind)
    for row in buckets:
        assert row["copies"] & (row["copies"] - 1) == 0
        assert row["contents"] * row["copies"] <= row["pages"] < row["contents"] * row["copies"] * 2
        assert (row["contents_bytes"], row["pages_bytes"]) == (row["contents"] * size, row["pages"] * size)
    by_policy = [row for row in rows_of(run, POLICY_SPECTRUM) if row["numa_node"] is None]
    for scope in ("image", "tenant", "salt", "all"):
        mine = [row for row in by_policy if row["scope"] == scope]
        pages = sum(row["copies"] * row["contents"] for row in mine)
        assert pages == candidates - zeros if not forks else pages <= candidates - zeros

    contents = rows_of(run, CONTENTS)
    assert [row["rank"] for row in contents] == list(range(1, len(contents) + 1))
    best = sorted(tree, key=lambda row: (-row["copies"], row["digest"]))[: len(contents)]
    names = [name for name in CONTENTS.schema.names if name in STABLE_TREE.schema.names]
    assert [{name: row[name] for name in names} for row in contents] == [{n: row[n] for n in names} for row in best]
    assert all(row["tenants"] <= row["images"] <= row["copies"] for row in contents)

    pairs = rows_of(run, SHARING)
    for row in pairs:
        assert row["image"] <= row["other"]
        assert 1 <= row["contents"] <= min(row["pages"], row["other_pages"])
        assert row["pages"] <= images[row["image"]]["duplicate"]
        assert row["other_pages"] <= images[row["other"]]["duplicate"]
        assert (row["image_id"], row["other_id"]) == tuple(images[row[n]]["image_id"] for n in ("image", "other"))
        if row["image"] == row["other"]:
            assert row["pages"] == row["other_pages"] == images[row["image"]]["shared_within"] >= 2 * row["contents"]
    within = sum(row["pages"] for row in pairs if row["image"] == row["other"])
    assert within == total["shared_within"]
    met = {row[name] for row in pairs if row["image"] != row["other"] for name in ("image", "other")}
    assert met == {image["scan_order"] for image in images if image["shared_with_others"]}

    running: Counter[str] = Counter()
    for row, image in zip(rows_of(run, CUMULATIVE), images, strict=True):
        assert (row["image"], row["image_id"]) == (image["scan_order"], image["image_id"])
        assert row["pages"] == sum(image[name] for name in ("zero", "zero_mapped_ksm", "duplicate", "unique"))
        assert row["zero"] == image["zero"] + image["zero_mapped_ksm"]
        running.update(pages=row["pages"], contents=row["contents_added"])
        assert (row["total_pages"], row["total_contents"]) == (running["pages"], running["contents"])
        assert row["contents_added"] + row["pages_known"] <= row["pages"]
        assert row["saved_pages"] == row["total_pages"] - row["total_contents"]
        assert row["saved_bytes"] == row["saved_pages"] * size
    assert (running["pages"], running["contents"]) == (candidates, sum(row["contents"] for row in spectrum))

    ladder = {row["policy"]: row for row in rows_of(run, POLICY)}
    saved = {name: row["saved_pages"] for name, row in ladder.items()}
    assert 0 == saved["never"] <= saved["zero"] <= saved["same_filled"] <= saved["all"]
    if not forks:  # a frame that fork shares brings its twins along, so that less may merge where more is allowed
        assert saved["image"] <= saved["tenant"] <= saved["all"]
    for row in ladder.values():
        assert row["saved_pages"] == row["merged_pages"] - row["frames_kept"]
        assert row["saved_pages"] == sum(row[f"saved_{kind}"] for kind in KINDS)
        assert row["saved_bytes"] == row["saved_pages"] * size
        assert row["saved_gib"] == row["saved_bytes"] / 2**30
    assert ladder["all"]["saved_bytes"] == counted["saved_bytes"]
    assert ladder["all"]["frames_kept"] == counted["pages_shared"]
    assert ladder["all"]["merged_pages"] == counted["zero_merges"] + counted["content_merges"]

    frames = rows_of(run, HUGE)
    assert sum(row["pages"] for row in frames) == candidates
    assert sum(row["mergeable_pages"] for row in frames) == zeros + total["duplicate"]
    assert sum(row["zero_pages"] for row in frames) == zeros
    for row in frames:
        low, high = row["mergeable"] * row["frames"], max(0, row["mergeable"] * 2 - 1) * row["frames"]
        assert low <= row["mergeable_pages"] <= min(high, row["pages"])
        assert max(row["huge_frames"], row["zero_frames"]) <= row["frames"]

    assert len(counters) in (1, 2)
    for row in counters:
        items = sum(row[name] for name in ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile"))
        assert items == row["rmap_items"]
        merged = row["pages_sharing"] + row["ksm_zero_pages"]
        assert row["general_profit"] == merged * size - row["rmap_items"] * 64
        assert row["saved_bytes"] == merged * size
    stats = rows_of(run, KSM_STAT)
    assert sum(row["ksm_rmap_items"] for row in stats) == counted["rmap_items"]
    assert sum(row["ksm_merging_pages"] for row in stats) == counted["pages_shared"] + counted["pages_sharing"]
    assert sum(row["ksm_zero_pages"] for row in stats) == counted["ksm_zero_pages"]
    profit = counted["general_profit"] + counted["pages_shared"] * size
    assert sum(row["ksm_process_profit"] for row in stats) == profit
    for row in rows_of(run, WHATIF):
        if row["present"]:
            same = (n for n in WHATIF.schema.names if n in COUNTERS.schema.names)
            assert {name: row[name] for name in same} == {n: counted[n] for n in WHATIF.schema.names if n in counted}
            assert row["merge_across_nodes"] == across


@given(images=fleets(), knobs=knobs())
@settings(CAREFUL, max_examples=40)
def test_every_table_equals_the_oracle(images: list[Image], knobs: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [written(folder / f"{image.image_id}.arrow", image) for image in images]
        # Up to 6.6 zero pages of split huge pages stay in the counters.
        run = ksmdist.run(paths, folder / "out", Settings(kernel="6.6", **knobs), "inline")
        check_oracle(run, images)
        check_identities(run)
        truth = oracle.tree_counters(images, run.settings, included=False)
        (counters,) = rows_of(run, COUNTERS)
        assert {name: counters[name] for name in truth} == truth


@given(images=fleets(), knobs=knobs(), kernel=st.sampled_from(["6.6", "6.12", "6.18"]))
@settings(CAREFUL, max_examples=25)
def test_identities_hold_with_huge_pages_that_are_split(
    images: list[Image], knobs: dict[str, Any], kernel: Any
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [written(folder / f"{image.image_id}.arrow", image) for image in images]
        check_identities(ksmdist.run(paths, folder / "out", Settings(kernel=kernel, **knobs), "inline"))


@pytest.mark.parametrize("ranges", [1, 4, 16])
def test_zero_pages_may_be_on_another_node_than_the_rest(ranges: int, tmp_path: Path) -> None:
    # Their content is in a range of its own, and has no rows in image_spectrum: this range knows of one node, that
    # of the others knows of one, and the two are not the same.
    image = Image(
        "a", "", [Page(0, ZERO, node=1), Page(PAGE, POOL[1]), Page(2 * PAGE, POOL[2]), Page(3 * PAGE, POOL[2])]
    )
    for across in (False, True):
        wanted = Settings(ranges=ranges, merge_across_nodes=across)
        run = ksmdist.run([written(tmp_path / "a.arrow", image)], tmp_path / f"out{across}", wanted, "inline")
        check_oracle(run, [image])
        check_identities(run)


@pytest.mark.parametrize("seed", range(12))
def test_identities_hold_where_fork_shares_frames(seed: int, tmp_path: Path) -> None:
    experiment = random_experiment(random.Random(seed))
    processes = [{"layout": p.layout, "forked_from": p.forked_from, "node": p.node} for p in experiment.processes]
    wanted = Settings(
        use_zero_pages=experiment.use_zero_pages,
        max_page_sharing=experiment.max_page_sharing,
        merge_across_nodes=experiment.merge_across_nodes,
        shard_pages=[None, 5][seed % 2],
    )
    check_identities(ksmdist.run(layout_images(tmp_path, processes), tmp_path / "out", wanted, "inline"), forks=True)


@st.composite
def taken(draw: st.DrawFn) -> list[list[Image]]:
    """Two or three passes of the same images: each a fleet of their names, so that most pages change or go."""
    first = draw(fleets(thp=False))
    passes = [first]
    for _ in range(draw(st.integers(1, 2))):
        now = []
        for image in passes[-1]:
            pages = {at.address: at for at in image.pages}
            for frame, place in draw(st.sets(st.sampled_from(SLOTS), max_size=6)):
                address = (frame * FRAME_PAGES + place) * PAGE
                if draw(st.booleans()):
                    pages[address] = Page(address, POOL[draw(st.integers(0, len(POOL) - 1))])
                else:
                    pages.pop(address, None)
            now.append(image._replace(pages=[pages[address] for address in sorted(pages)]))
        passes.append(now)
    return passes


def bytes_of(image: Image) -> dict[int, bytes]:
    return {at.address: at.content for at in image.pages if not at.placed}


def previous(folder: Path, passes: list[list[Image]], wanted: Settings, kept: bool) -> ksmdist.Run:
    """A run for each pass, after the run before; kept: the first keeps checksums, else its images are read again."""
    run: ksmdist.Run | None = None
    for number, images in enumerate(passes):
        paths = [written(folder / f"{image.image_id}-{number}.arrow", image) for image in images]
        settings = replace(wanted, checksums=kept and not number)
        run = ksmdist.run(paths, folder / f"out{number}", settings, "inline", previous=run.path if run else None)
    assert run is not None
    return run


def manifest(folder: Path, passes: list[list[Image]], wanted: Settings) -> ksmdist.Run:
    """One run, by a manifest of all passes."""
    entries = []
    for number, images in enumerate(passes, 1):
        for image in images:
            path = written(folder / f"{image.image_id}-{number}.arrow", image)
            entries.append(f"- {{uri: {path}, image: {image.image_id}, pass: {number}}}\n")
    (folder / "fleet.yaml").write_text("".join(reversed(entries)))
    return ksmdist.run([], folder / "out", wanted, "inline", manifest=str(folder / "fleet.yaml"))


@given(passes=taken(), knobs=knobs(), how=st.sampled_from(["manifest", "checksums", "images"]))
@settings(CAREFUL, max_examples=25)
def test_passes_say_what_changed_as_the_kernels_checksum_would(
    passes: list[list[Image]], knobs: dict[str, Any], how: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, wanted = Path(name), Settings(**knobs)
        run = (
            manifest(folder, passes, wanted)
            if how == "manifest"
            else previous(folder, passes, wanted, how == "checksums")
        )
        last = [
            now._replace(pages=oracle.last_pass(now.pages, bytes_of(before)))
            for now, before in zip(passes[-1], passes[-2], strict=True)
        ]
        of_image = [[bytes_of(images[number]) for images in passes] for number in range(len(last))]
        rows = [row for n, image in enumerate(last) for row in oracle.passes(n, image.image_id, of_image[n])]
        assert rows_of(run, PASSES) == rows
        files = sorted(run.path.glob(CHECKSUMS.file))
        kept = [row for file in files for row in pq.read_table(file, partitioning=None).to_pylist()]
        assert kept == [row for n in range(len(last)) for row in oracle.checksums(n, of_image[n])]
        check_oracle(run, last)
        check_identities(run)
        counters = rows_of(run, COUNTERS)
        assert [row["volatile"] for row in counters] == ["excluded", "included"]
        for row in counters:
            truth = oracle.tree_counters(last, run.settings, row["volatile"] == "included")
            assert {name: row[name] for name in truth} == truth


def test_an_image_with_one_pass_has_nothing_to_compare(tmp_path: Path) -> None:
    first = Image("a", "", [Page(0, page(1)), Page(PAGE, page(2)), Page(2 * PAGE, ZERO)])
    now = Image("a", "", [Page(0, page(1)), Page(PAGE, page(3)), Page(2 * PAGE, ZERO)])
    other = Image("b", "", [Page(0, page(1)), Page(PAGE, page(3))])
    lines = [f"- {{uri: {written(tmp_path / 'a1.arrow', first)}, image: a, pass: 1}}\n"]
    lines += [f"- {{uri: {written(tmp_path / 'a2.arrow', now)}, image: a, pass: 2}}\n"]
    lines += [f"- {{uri: {written(tmp_path / 'b.arrow', other)}, image: b}}\n"]
    (tmp_path / "fleet.yaml").write_text("".join(lines))
    run = ksmdist.run([], tmp_path / "out", Settings(), "inline", manifest=str(tmp_path / "fleet.yaml"))
    assert [(row["image_id"], row["pass"], row["changed"]) for row in rows_of(run, PASSES)] == [
        ("a", 1, None),
        ("a", 2, 1),
    ]
    check_oracle(run, [now._replace(pages=oracle.last_pass(now.pages, bytes_of(first))), other])
    excluded, included = rows_of(run, COUNTERS)
    assert (excluded["pages_sharing"], excluded["pages_volatile"], excluded["pages_unshared"]) == (1, 1, 2)
    assert (included["pages_sharing"], included["pages_volatile"], included["pages_unshared"]) == (2, 0, 1)
