"""Table exposure against the slow way, the ladder with salts, and where a salt must not be found."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import exposure
from ksmdist.checkpoint import Checkpoint
from ksmdist.contents import entropy_classes
from ksmdist.errors import ImageReadError, SettingsError
from ksmdist.exposure import Held, TenantPairs, find_exposed, is_near, tenant_groups
from ksmdist.report.exposure import exposed_lines, exposure_section, summarize_exposure
from ksmdist.settings import Settings
from ksmdist.store import read_table
from ksmdist.tables import EXPOSURE, IMAGES, KINDS, POLICIES, POLICY, RARE_CONTENT, TENANT_SET

from .conftest import PAGE, ZERO, arrow_image, eligible, invoke, page, printed

RANDOM = [np.random.default_rng(n).bytes(PAGE) for n in range(2)]
TEXT = bytes(range(32)) * (PAGE // 32)  # 5 bits a byte
POOL = [ZERO, b"\x6b" * PAGE, page(1), page(2), TEXT, *RANDOM]
ENTROPY = {page(1): "low", page(2): "low", TEXT: "middle", RANDOM[0]: "high", RANDOM[1]: "high"}

CAREFUL = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)


class Image(NamedTuple):
    """An image in scan order; pages: (content, node)."""

    tenant: str
    salt: str
    pages: Sequence[tuple[bytes, int]]


def kind_of(content: bytes) -> str:
    word = content[:8]
    return "other" if content != word * (len(content) // 8) else "same_filled" if any(word) else "zero"


def oracle(images: Sequence[Image], wanted: Settings) -> list[dict[str, Any]]:
    """Table exposure, from a dict of page bytes (and node) to the tenants and salts that hold them."""
    held: dict[tuple[bytes, int], Counter[tuple[str, str]]] = defaultdict(Counter)
    for image in images:
        for content, node in image.pages:
            if any(content) or not wanted.use_zero_pages:
                held[content, -1 if wanted.merge_across_nodes else node][image.tenant, image.salt] += 1
    rows: dict[tuple[str, str, int], Counter[str]] = defaultdict(Counter)
    for (content, _), where in held.items():
        kind, copies, limit = kind_of(content), sum(where.values()), wanted.max_page_sharing
        tenants = sorted({tenant for tenant, _ in where})
        for one, other in itertools.combinations(tenants, 2):
            row = rows[one, other, KINDS.index(kind)]
            mine, theirs = ({salt: n for (who, salt), n in where.items() if who == tenant} for tenant in (one, other))
            row.update(contents=1, pages=sum(mine.values()), other_pages=sum(theirs.values()))
            row["near_contents"] += limit is not None and any(
                (copies + more) % limit == 1 for more in range(limit // 8 + 1)
            )
            row["salt_pages"] += sum(n for salt, n in mine.items() if salt in theirs)
            row["salt_other_pages"] += sum(n for salt, n in theirs.items() if salt in mine)
            if len(tenants) == 2:
                row.update(rare_contents=1, rare_pages=sum(mine.values()), rare_other_pages=sum(theirs.values()))
                row.update({"rare_looked_at": 1, f"rare_{ENTROPY.get(content, 'low')}": 1})
    return [
        {name: row[name] for name in EXPOSURE.schema.names} | {"tenant": one, "other": other, "kind": KINDS[kind]}
        for (one, other, kind), row in sorted(rows.items())
    ]


def written(folder: Path, images: Sequence[Image], reverse: bool = False) -> Path:
    """The images, and a manifest of them."""
    entries = []
    for number, image in enumerate(images):
        path = folder / f"image{number}.arrow"
        rows = [(at * PAGE, content, eligible(), None, None, node) for at, (content, node) in enumerate(image.pages)]
        arrow_image(path, rows, {"ksmdist.image_id": f"image{number}"})
        named = {name: value for name, value in (("tenant", image.tenant), ("salt", image.salt)) if value}
        entries.append({"uri": str(path), **named})
    (folder / "fleet.json").write_text(json.dumps(entries[::-1] if reverse else entries))
    return folder / "fleet.json"


def run_of(folder: Path, images: Sequence[Image], wanted: Settings, reverse: bool = False) -> ksmdist.Run:
    manifest = written(folder, images, reverse)
    return ksmdist.run([], folder / "out", wanted, "inline", manifest=str(manifest))


def rows_of(run: ksmdist.Run, table: Any = EXPOSURE) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_table(run.path, table).to_pylist()
    return found


@st.composite
def fleets(draw: st.DrawFn) -> list[Image]:
    return [
        Image(
            draw(st.sampled_from(["", "a", "b", "c"])),
            draw(st.sampled_from(["", "s1", "s2"])),
            draw(st.lists(st.tuples(st.sampled_from(POOL), st.integers(0, 1)), max_size=12)),
        )
        for _ in range(draw(st.integers(1, 5)))
    ]


@given(
    images=fleets(),
    limit=st.sampled_from([2, 3, 16, None]),
    across=st.booleans(),
    zero=st.booleans(),
    ranges=st.sampled_from([1, 8]),
    shard=st.sampled_from([None, 3]),
    reverse=st.booleans(),
)
@CAREFUL
def test_exposure_is_the_oracles(
    images: list[Image],
    limit: int | None,
    across: bool,
    zero: bool,
    ranges: int,
    shard: int | None,
    reverse: bool,
) -> None:
    wanted = Settings(
        max_page_sharing=limit, merge_across_nodes=across, use_zero_pages=zero, ranges=ranges, shard_pages=shard
    )
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(Path(folder), images, wanted, reverse)
        assert rows_of(run) == oracle(images, wanted)
        check_ladder(run, images)


def check_ladder(run: ksmdist.Run, images: Sequence[Image]) -> None:
    ladder = {row["policy"]: row for row in rows_of(run, POLICY)}
    saved = {name: row["saved_bytes"] for name, row in ladder.items()}
    assert saved["image"] <= min(saved["tenant"], saved["salt"]) <= max(saved["tenant"], saved["salt"]) <= saved["all"]
    for row in ladder.values():
        assert row["cost_bytes"] == saved["all"] - row["saved_bytes"]
        assert row["cost_gib"] == row["cost_bytes"] / 2**30
    if len({image.salt for image in images}) == 1:
        assert saved["salt"] == saved["all"]
    if all((one.salt == two.salt) == (one.tenant == two.tenant) for one in images for two in images):
        assert saved["salt"] == saved["tenant"]


RED = Image("red", "x", [(ZERO, 0), (ZERO, 0), (page(1), 0), (page(2), 0), (RANDOM[0], 0), (RANDOM[0], 0), (TEXT, 0)])
BLUE = Image("blue", "y", [(ZERO, 0), (page(1), 0), (page(2), 0), (RANDOM[0], 0), (page(9), 0)])
GREEN = Image("green", "x", [(page(1), 0), (TEXT, 0), (page(8), 0)])


def test_an_example_by_hand(tmp_path: Path) -> None:
    run = run_of(tmp_path, [RED, BLUE, GREEN], Settings())
    none = dict.fromkeys(EXPOSURE.schema.names, 0)
    assert rows_of(run) == [
        none | {"tenant": "blue", "other": "green", "kind": "other", "contents": 1, "pages": 1, "other_pages": 1},
        none
        | {"tenant": "blue", "other": "red", "kind": "zero", "contents": 1, "pages": 1, "other_pages": 2}
        | {"rare_contents": 1, "rare_pages": 1, "rare_other_pages": 2, "rare_looked_at": 1, "rare_low": 1},
        none
        | {"tenant": "blue", "other": "red", "kind": "other", "contents": 3, "pages": 3, "other_pages": 4}
        | {"rare_contents": 2, "rare_pages": 2, "rare_other_pages": 3, "rare_looked_at": 2}
        | {"rare_low": 1, "rare_high": 1},
        none
        | {"tenant": "green", "other": "red", "kind": "other", "contents": 2, "pages": 2, "other_pages": 2}
        | {"rare_contents": 1, "rare_pages": 1, "rare_other_pages": 1, "rare_looked_at": 1, "rare_middle": 1}
        | {"salt_pages": 2, "salt_other_pages": 2},
    ]
    # Pages merged, less one of each content: what may merge among red and green, red's own, and so on.
    ladder = {row["policy"]: row["saved_pages"] for row in rows_of(run, POLICY)}
    assert (ladder["image"], ladder["tenant"], ladder["salt"], ladder["all"]) == (2, 2, 4, 8)


def test_exposure_may_be_empty(tmp_path: Path) -> None:
    run = run_of(tmp_path, [RED, RED._replace(salt="z")], Settings())
    assert rows_of(run) == []
    (tmp_path / "two").mkdir()
    run = run_of(tmp_path / "two", [Image("red", "", [(page(1), 0)]), Image("blue", "", [(page(2), 0)])], Settings())
    assert rows_of(run) == []
    (tmp_path / "three").mkdir()
    assert rows_of(run_of(tmp_path / "three", [Image("a", "", []), Image("b", "", [])], Settings())) == []


def test_images_without_a_tenant_are_one_tenant(tmp_path: Path) -> None:
    run = run_of(tmp_path, [RED._replace(tenant=""), BLUE._replace(tenant=""), GREEN], Settings())
    assert {(row["tenant"], row["other"]) for row in rows_of(run)} == {("", "green")}


def test_only_a_sample_of_many_rare_contents_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [(page(n), 0) for n in range(100, 140)]
    images = [Image("a", "", pages), Image("b", "", pages)]
    found = []
    for ranges in (1, 4):
        with monkeypatch.context() as patched:
            for module in ("exposure", "tenants"):
                patched.setattr(f"ksmdist.{module}.MOST_RARE", 7)
            (tmp_path / str(ranges)).mkdir()
            found += rows_of(run_of(tmp_path / str(ranges), images, Settings(ranges=ranges)))
    assert found[0] == found[1]
    assert (found[0]["rare_contents"], found[0]["rare_looked_at"], found[0]["rare_low"]) == (40, 7, 7)


def test_a_page_that_is_gone_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise ImageReadError("is gone", "image0", "")

    monkeypatch.setattr("ksmdist.tenants.read_again", gone)
    run = run_of(tmp_path, [RED, BLUE, GREEN], Settings())
    rows = [row for row in rows_of(run) if row["kind"] == "other"]
    assert [row["rare_unknown"] for row in rows] == [0, 2, 1]
    assert [row["rare_looked_at"] for row in rows] == [0, 2, 1]
    assert any("3 contents of just two tenants could not be read again" in caveat for caveat in run.caveats)
    monkeypatch.undo()
    (tmp_path / "again").mkdir()
    assert not any("two tenants" in caveat for caveat in run_of(tmp_path / "again", [RED, BLUE], Settings()).caveats)


@pytest.mark.parametrize("limit", [2, 3, 8, 16, 256])
def test_near_is_where_a_few_more_copies_leave_one_over(limit: int) -> None:
    copies = np.arange(2, 3 * limit + 2)
    slow = [any((n + more) % limit == 1 for more in range(limit // 8 + 1)) for n in copies.tolist()]
    assert is_near(copies, limit).tolist() == slow
    assert not is_near(copies, None).any()


def test_near_counts_copies_of_all_tenants(tmp_path: Path) -> None:
    images = [Image(name, "", [(page(1), 0)] * 9 + [(page(2), 0)]) for name in ("a", "b")]
    (row,) = rows_of(run_of(tmp_path, images, Settings(max_page_sharing=17)))
    assert (row["contents"], row["near_contents"]) == (2, 1)  # 18 = 1 mod 17; 2 is 15 below


def test_pairs_are_counted_the_same_in_any_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(7)
    rows = sorted({(int(c), int(i)) for c, i in random.integers(0, (30, 12), (150, 2))})
    content, image = np.array(rows).T
    number, content = np.unique(content, return_inverse=True)
    held = Held(
        content,
        image,
        np.zeros(len(content), np.int64),
        random.integers(1, 5, len(content)),
        image.astype(np.uint64),
        random.integers(0, 3, len(number)).astype(np.int8),
        np.arange(16 * len(number), dtype=np.uint8).reshape(-1, 16),
    )
    tenant, salt = np.arange(12) % 5, np.arange(12) % 3
    found = find_exposed(held, tenant, salt, Settings(max_page_sharing=3))
    assert found.sets.schema.equals(TENANT_SET.schema, check_metadata=True)
    assert found.rare.schema.equals(RARE_CONTENT.schema, check_metadata=True)
    tables = []
    for cells, at_once in ((1 << 17, 1 << 20), (1, 3)):
        monkeypatch.setattr(exposure, "_GROUP_CELLS", cells)
        monkeypatch.setattr(exposure, "_PAIRS_AT_ONCE", at_once)
        parts = []
        for first, last in itertools.pairwise(tenant_groups(5)):
            pairs = TenantPairs(first, last, 5, True)
            pairs.add(found.sets)
            parts.append(pairs.table(list("abcde"), np.zeros((0, 6), np.int64)))
        tables.append(pa.concat_tables(parts))
    assert len(parts) == 5
    assert tables[0].equals(tables[1])
    assert len(tables[0]) > 10


def test_groups_of_tenants_cover_all() -> None:
    for tenants in (2, 3, 1000, 200_000):
        groups = tenant_groups(tenants)
        assert groups[0] == 0
        assert groups[-1] == tenants
        assert groups == sorted(set(groups))
        assert max(b - a for a, b in itertools.pairwise(groups)) * tenants <= max(1 << 17, tenants)


def test_entropy_classes() -> None:
    pages = np.frombuffer(ZERO + page(1) + TEXT + RANDOM[0] + bytes(range(256)) * (PAGE // 256), np.uint8)
    assert entropy_classes(pages.reshape(-1, PAGE)).tolist() == [0, 0, 1, 2, 2]
    edge = bytes(range(16)) * (PAGE // 16)  # 4 bits a byte to the bit
    assert entropy_classes(np.frombuffer(edge, np.uint8).reshape(1, PAGE)).tolist() == [1]
    assert entropy_classes(np.zeros((0, PAGE), np.uint8)).tolist() == []


SECRET = "pshare-7e1f"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_salt_is_in_no_file_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, bytes] = {}
    finish = Checkpoint.finish

    def keep(held: Any) -> None:
        seen.update(files_of(held.directory))
        finish(held)

    monkeypatch.setattr(Checkpoint, "finish", keep)
    run = run_of(tmp_path, [RED._replace(salt=SECRET), BLUE, GREEN._replace(salt=SECRET)], Settings())
    assert [row["salt"] for row in rows_of(run, IMAGES)] == [1, 2, 1]
    assert any(name.startswith("work") for name in seen)
    for name, data in (seen | files_of(run.path)).items():
        assert SECRET.encode() not in data, name
    assert SECRET not in printed("report", run.path) + printed("report", run.path, "--json")


def test_a_salt_goes_with_its_image_and_is_not_shown(tmp_path: Path) -> None:
    arrow_image(tmp_path / "a.arrow", [(0, page(1), eligible())], {"ksmdist.salt": SECRET, "ksmdist.kind": "guest"})
    arrow_image(tmp_path / "b.arrow", [(0, page(1), eligible())], {"ksmdist.image_id": "b"})
    printed("export", tmp_path / "a.arrow", "-o", tmp_path / "a.elf")
    printed("import", tmp_path / "a.elf", "-o", tmp_path / "again.arrow", "--id", "again")
    for name in ("a.arrow", "a.elf", "again.arrow"):
        shown = printed("info", tmp_path / name, "--json")
        assert [image["salted"] for image in json.loads(shown)] == [True]
        assert SECRET not in shown
    assert [image["salted"] for image in json.loads(printed("info", tmp_path / "b.arrow", "--json"))] == [False]
    run = ksmdist.run([tmp_path / "again.arrow", tmp_path / "b.arrow"], tmp_path / "out", engine="inline")
    assert [row["salt"] for row in rows_of(run, IMAGES)] == [1, 0]
    saved = {row["policy"]: row["saved_pages"] for row in rows_of(run, POLICY)}
    assert (saved["tenant"], saved["salt"], saved["all"]) == (1, 0, 1)


def test_a_salt_that_cannot_be_is_not_shown(tmp_path: Path) -> None:
    for salt in ("7\n" + SECRET, SECRET * 50, 77_113):
        (tmp_path / "fleet.json").write_text(json.dumps([{"uri": "a.raw", "salt": salt}]))
        with pytest.raises(SettingsError) as caught:
            invoke("run", "--manifest", tmp_path / "fleet.json", "-o", tmp_path / "out")
        assert "salt" in str(caught.value)
        assert SECRET not in str(caught.value)
        assert "77113" not in str(caught.value)


def fake_manifest(tenants: Sequence[str], salts: Sequence[int] = ()) -> dict[str, Any]:
    return {
        "images": [
            {"tenant": tenant, "salt": salt} for tenant, salt in itertools.zip_longest(tenants, salts, fillvalue=0)
        ]
    }


POLICY_ROWS = [{"policy": name, "cost_gib": 1.5, "saved_bytes": 1} for name in POLICIES]


@pytest.mark.parametrize("batch", [1, 2, 7, 1000])
def test_the_report_sums_up_the_table_whatever_its_batches(batch: int) -> None:
    random = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for one, other in itertools.combinations("abcdef", 2):
        for kind in KINDS:
            if random.random() < 0.7:
                counts: dict[str, Any] = dict.fromkeys(EXPOSURE.schema.names, int(random.integers(1, 9)))
                rows.append(counts | {"tenant": one, "other": other, "kind": kind})
    table = pa.Table.from_pylist(rows, schema=EXPOSURE.schema)
    found = summarize_exposure(fake_manifest("abcdefg"), table.to_batches(batch), 3)
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        pairs[row["tenant"], row["other"]].append(row)

    def rank(pair: list[dict[str, Any]]) -> tuple[int, int, int]:
        of = [row for row in pair if row["kind"] == "other"]
        pages = [sum(row["pages"] + row["other_pages"] for row in some) for some in (of, pair)]
        return (-sum(row["rare_contents"] for row in of), -pages[0], -pages[1])

    best = sorted(pairs, key=lambda key: rank(pairs[key]))[:3]
    assert [(pair["tenant"], pair["other"]) for pair in found["top"]] == best
    for pair in found["top"]:
        expected = pairs[pair["tenant"], pair["other"]]
        assert [pair | row for row in pair["kinds"]] == [pair | row for row in expected]
    assert (found["tenants"], found["salts"], found["pairs"], found["rows"]) == (7, 1, len(pairs), len(rows))
    assert found["rare"]["high"] == sum(row["rare_high"] for row in rows if row["kind"] == "other")


def test_what_people_read_where_nothing_is_exposed() -> None:
    for tenants, said in (([], "one tenant"), ([""], "one tenant"), (["", "a"], "No two of 2 tenants")):
        found = summarize_exposure(fake_manifest(tenants), [], 3)
        text = exposure_section(found, POLICY_ROWS)
        assert said in text
        assert "data-grid" not in text
        lines = exposed_lines(found, POLICY_ROWS, 3)
        assert len(lines) == (len(tenants) > 1)


def test_people_see_what_was_not_looked_at(tmp_path: Path) -> None:
    run = run_of(tmp_path, [RED, BLUE, GREEN], Settings())
    shown = " ".join(printed("report", run.path).split())
    assert "blue red 3 7 2 green red 2 4 1 blue green 1 2 0" in shown
    assert "3 rare contents, of just two tenants: 1 of low entropy, 1 middle, 1 high" in shown
    assert "within a salt" in shown
    found = json.loads(printed("report", run.path, "--json"))
    assert (found["exposure"]["salts"], found["exposure"]["tenants"], found["exposure"]["pairs"]) == (2, 3, 3)
    rare = found["exposure"]["rare"] | {"looked_at": 2, "high": 0, "unknown": 1}
    (line, _) = (row[0] for row in exposed_lines(found["exposure"] | {"rare": rare}, found["policy"], 0)[1:])
    assert "of 2 looked at 1 of low entropy, 1 middle, 0 high, 1 not known" in line
    printed("report", run.path, "--html", tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert 'data-grid="exposure"' in text
    assert "among images with one salt" in text
