"""The report's page: what is in it, that nothing can get out of it or into it, and how it behaves in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ksmdist
from ksmdist.report.markup import NAME_BYTES, embed, plain
from ksmdist.report.page_data import CELLS, CURVE_POINTS, embedded, split, variety
from ksmdist.report.terminal import format_bytes, headline

from .conftest import ZERO, MakeImage, page
from .report_runs import FILL, HOSTILE, finished_run, incomplete, made_up, number, of_run, pairs, render, table

if TYPE_CHECKING:
    pass


class Parsed(HTMLParser):
    """The page's elements and attributes, scripts by their text, tables by their id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []  # what scripts and styles hold
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._table: list[list[str]] | None = None
        self._cell = self._raw = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, ""))
            self._raw = True
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs).get("id") or "", [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")
        self._raw = False

    def handle_data(self, data: str) -> None:
        if self._raw:
            self.raw[-1] = (self.raw[-1][0], self.raw[-1][1] + data)
            return
        self.text += data
        if self._cell and self._table is not None:
            self._table[-1][-1] += data

    @property
    def data(self) -> Any:
        return json.loads(next(text for tag, text in self.raw if text.startswith("{")))

    def rows(self, name: str) -> list[dict[str, str]]:
        head, *rows = self.tables[name]
        return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def fleet() -> str:
    """The page of 10,000 images, of which each shares with 200."""
    return render(made_up(10_000, partners=200))


def test_the_page_fetches_nothing_and_runs_what_its_policy_names_alone(finished: Path) -> None:
    parsed = Parsed(render(of_run(finished)))
    elements = {tag for tag, _ in parsed.tags}
    assert not elements & {"link", "img", "iframe", "object", "embed", "audio", "video", "base", "source"}
    for tag, attributes in parsed.tags:
        for name in ("src", "srcset", "href", "action", "data", "poster", "formaction"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    runs = [text for tag, text in parsed.raw if not text.startswith("{")]
    hashes = ["'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'" for text in runs]
    assert sorted(re.findall(r"'sha256-[^']+'", policy)) == sorted(hashes)
    assert "url(" not in next(text for tag, text in parsed.raw if tag == "style")
    assert "@import" not in next(text for tag, text in parsed.raw if tag == "style")


def test_names_from_images_stay_text() -> None:
    run = incomplete(made_up(9, names=HOSTILE))
    text = render(run)
    hostile, tame = Parsed(text), Parsed(render(incomplete(made_up(9))))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in tame.tags]
    embedded_text = next(raw for _, raw in hostile.raw if raw.startswith("{"))
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\u2029\x00-\x09\x0b-\x1f]", hostile.text + embedded_text)
    column = [c["name"] for c in hostile.data["images"]["columns"]].index("image_id")
    assert hostile.data["images"]["data"][column][: len(HOSTILE)] == [plain(name) for name in HOSTILE]
    assert hostile.rows("holes-table")[0]["image"] == HOSTILE[0]


@given(st.text(max_size=400), st.integers(16, 200))
def test_plain_shows_what_is_there_and_no_more_than_asked(text: str, nbytes: int) -> None:
    shown = plain(text, nbytes)
    assert len(shown.encode()) <= nbytes
    assert not {unicodedata.category(sign) for sign in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    if text.isprintable() and len(text.encode()) <= nbytes:
        assert shown == text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_embedded_json_comes_back_and_ends_no_element(value: Any) -> None:
    def as_read(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: as_read(each) for key, each in item.items()}
        if isinstance(item, list):
            return [as_read(each) for each in item]
        whole = isinstance(item, int) and not isinstance(item, bool)
        return str(item) if whole and abs(item) >= 1 << 53 else item

    text = embed(value)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == as_read(value)


@pytest.mark.parametrize("use_zero_pages", [False, True])
def test_what_is_saved_adds_up(make_raw: MakeImage, tmp_path: Path, use_zero_pages: bool) -> None:
    images = [make_raw(f"{n}.raw", [ZERO] * 9 + [FILL] * 5 + [page(1), page(2), page(2)]) for n in "abc"]
    settings = ksmdist.Settings(use_zero_pages=use_zero_pages, max_page_sharing=4)
    ksmdist.run(images, tmp_path / "run", settings)
    run = of_run(tmp_path / "run")
    saved = run.rows("counters")[0]["saved_bytes"]
    parts = split(run.tables["policy"], 4096)
    assert sum(part["bytes"] for part in parts) == run.rows("policy")[-1]["saved_bytes"] == saved
    shown = Parsed(render(run)).rows("split-table")
    assert [number(row["pages"]) for row in shown[:-1]] == [part["pages"] for part in parts]
    assert number(shown[-1]["pages"]) == saved // 4096
    assert shown[-1]["bytes"] == format_bytes(saved)


def test_tables_without_a_script_equal_the_parquet(finished: Path) -> None:
    run = of_run(finished)
    parsed = Parsed(render(run))
    counters = run.rows("counters")[0]
    for told in parsed.rows("counters-table"):
        assert number(told["value"]) == counters[told["counter"]], told
    assert {row["counter"] for row in parsed.rows("counters-table")} > {
        "pages_shared",
        "pages_sharing",
        "saved_bytes",
    }
    policy = parsed.rows("policy-table")
    assert run.exposure["salts"] == 1  # so that policy salt is all
    for told, row in zip(policy, [row for row in run.rows("policy") if row["policy"] != "salt"], strict=True):
        assert told["costs GiB"] == f"{row['cost_gib']:,.3f}"
        assert [number(told[name]) for name in ("merged", "frames kept", "saved")] == [
            row[name] for name in ("merged_pages", "frames_kept", "saved_pages")
        ]
    for told, row in zip(parsed.rows("whatif-table"), run.rows("whatif"), strict=True):
        for name in ("pages_shared", "pages_sharing", "general_profit", "saved_bytes", "profit", "zero_pages_counted"):
            assert number(told[name]) == row[name]
        assert ("now" in told["marked"]) == row["present"]
    assert sum("best" in told["marked"] for told in parsed.rows("whatif-table")) == 1
    for told, row in zip(parsed.rows("spectrum-table"), run.rows("spectrum_buckets"), strict=True):
        assert (number(told["contents"]), number(told["pages"])) == (row["contents"], row["pages"])
    assert sum(number(told["zero or with a copy, in all"]) or 0 for told in parsed.rows("huge-table")) == sum(
        row["mergeable_pages"] for row in run.rows("huge")
    )
    assert len(parsed.rows("checks-table")) == len(run.manifest["identities"])
    assert {told["result"] for told in parsed.rows("checks-table")} == {"holds"}
    assert {told["setting"] for told in parsed.rows("settings-table")} == set(run.manifest["settings"])
    assert headline(run.manifest["summary"]) in parsed.text


def test_what_the_script_reads_equals_the_parquet(finished: Path) -> None:
    run = of_run(finished)
    data = embedded(run)
    grid = dict(zip([c["name"] for c in data["images"]["columns"]], data["images"]["data"], strict=True))
    for name in ("total", "zero", "duplicate", "unique", "shared_within", "shared_with_others", "tenant"):
        assert grid[name] == run.tables["images"].column(name).to_pylist()
    for name in ("ksm_merging_pages", "ksm_process_profit"):
        assert grid[name] == run.tables["ksm_stat"].column(name).to_pylist()
    assert data["whatif"]["rows"] == run.rows("whatif")
    contents = dict(zip([c["name"] for c in data["contents"]["columns"]], data["contents"]["data"], strict=True))
    assert contents["copies"] == run.tables["contents"].column("copies").to_pylist()
    assert contents["digest"] == [digest.hex()[:16] for digest in run.tables["contents"].column("digest").to_pylist()]


def test_no_byte_of_a_page_is_in_the_page(make_raw: MakeImage, tmp_path: Path) -> None:
    secret = b"a password that nobody should read"
    image = make_raw("a.raw", [secret.ljust(4096, b"!")] * 3 + [ZERO])
    ksmdist.run([image], tmp_path / "run")
    text = render(of_run(tmp_path / "run"))
    assert secret.decode() not in text
    assert "!!!!" not in text


spectra = st.lists(st.tuples(st.sampled_from(["zero", "same_filled", "other"]), st.integers(1, 9), st.integers(1, 5)))


@given(spectra)
def test_variety_is_what_counting_contents_one_by_one_gives(rows: list[tuple[str, int, int]]) -> None:
    spectrum = table("spectrum", [{"kind": k, "copies": n, "frames": n, "contents": c} for k, n, c in rows])
    copies = sorted((n for k, n, c in rows if k != "zero" and n > 1 for _ in range(c)), reverse=True)

    def fewest(tenths: int) -> int:
        return next(i for i in range(len(copies) + 1) if 10 * sum(copies[:i]) >= tenths * sum(copies))

    expected = {"pages": sum(copies), "contents": len(copies), "half": fewest(5), "nine_tenths": fewest(9)}
    assert variety(spectrum) == expected


@pytest.mark.parametrize("images", [2, 40, CELLS, CELLS + 1, 250])
def test_the_map_is_the_mean_over_pairs_whatever_the_batches(images: int) -> None:
    run = made_up(images, partners=30)
    whole = pa.Table.from_batches(list(pairs(images, 30)))
    data = embedded(replace(run, sharing=whole.to_batches(max_chunksize=97)))
    assert data["heat"] == embedded(replace(run, sharing=whole.to_batches()))["heat"]
    side = min(images, CELLS)
    shared = np.zeros((images, images))
    for row in whole.to_pylist():
        shared[row["image"], row["other"]] = row["pages"]
        if row["image"] != row["other"]:
            shared[row["other"], row["image"]] = row["other_pages"]
    heat = data["heat"]
    assert heat["side"] == side
    members = [range(first, last + 1) for first, last in zip(heat["first"], heat["last"], strict=True)]
    assert [i for cell in members for i in cell] == list(range(images))
    for row, column, value, _ in zip(*heat["cells"]["data"], strict=True):
        values = [shared[i, j] for i in members[row] for j in members[column] if i != j or images <= CELLS]
        assert value == pytest.approx(np.mean(values), abs=0.006)
    named = {tuple(row) for row in zip(*data["pairs"]["data"], strict=True)}
    apart = [row for row in whole.to_pylist() if row["image"] != row["other"]]
    ranked = sorted((row["pages"] + row["other_pages"] for row in apart), reverse=True)
    assert data["pairs"]["total"] == len(ranked)
    assert len(named) == min(len(ranked), 1000)
    least = min(row[3] + row[4] for row in named)
    assert least == ranked[len(named) - 1]


def test_the_same_run_is_the_same_page(finished: Path) -> None:
    assert render(of_run(finished)) == render(of_run(finished))


def test_ten_thousand_images_stay_small(fleet: str) -> None:
    assert len(fleet.encode()) < 5_000_000
    data = Parsed(fleet).data
    assert len(data["images"]["data"][0]) == 10_000
    assert len(data["cumulative"]["data"][0]) == CURVE_POINTS
    assert data["cumulative"]["data"][0][-1] == 9_999
    assert len(data["heat"]["cells"]["data"][0]) <= CELLS * CELLS


def test_names_of_any_length_keep_the_page_small() -> None:
    run = made_up(10_000, partners=2, names=[f"{i}-" + "ä" * 300 for i in range(10_000)])
    text = render(run)
    assert len(text.encode()) < 5_000_000
    assert max(len(name.encode()) for name in Parsed(text).data["images"]["data"][1]) <= NAME_BYTES


def test_an_incomplete_run_says_so_first_and_unknown_is_no_zero() -> None:
    text = Parsed(render(incomplete(made_up(3)))).text
    assert text.index("INCOMPLETE: 12 pages in 1 range could not be read") < text.index("What is merged")
    assert "1 image could not be reached" in text
    whole = render(made_up(3))
    assert "INCOMPLETE" not in Parsed(whole).text
    assert "No holes" in whole
    run = incomplete(made_up(3))
    rows = run.rows("images")
    rows[1]["unreadable"] = None
    data = embedded(replace(run, tables=dict(run.tables) | {"images": table("images", rows)}))
    grid = dict(zip([c["name"] for c in data["images"]["columns"]], data["images"]["data"], strict=True))
    assert (grid["total"][1], grid["zero"][1], grid["ksm_merging_pages"][1]) == (None, None, None)
    assert number(Parsed(render(run)).rows("holes-table")[1]["pages"]) is None


def test_one_pass_is_not_known_and_two_are_counted_both_ways() -> None:
    once, twice = Parsed(render(made_up(3))), Parsed(render(made_up(3, several_passes=True)))
    assert "which pages change is not known" in once.text
    first, second = twice.rows("passes-table")
    assert (number(first["changed"]), number(second["changed"])) == (None, 21)
    row = next(row for row in twice.rows("counters-table") if row["counter"] == "pages_sharing")
    assert "have one pass" not in twice.text
    run = made_up(3, several_passes=True)
    some = dict(run.tables) | {"passes": run.tables["passes"].slice(0, 2)}
    assert (
        "2 of 3 images have one pass: what changes there is not known" in Parsed(render(replace(run, tables=some))).text
    )
    assert number(row["changed pages included"]) == (number(row["changed pages excluded"]) or 0) + 10


def test_a_run_of_nothing_says_so(make_raw: MakeImage, tmp_path: Path) -> None:
    ksmdist.run([make_raw("a.raw", [None])], tmp_path / "run")
    text = Parsed(render(of_run(tmp_path / "run"))).text
    for sentence in ("Nothing is merged.", "this table is empty", "There is one image", "No page is eligible"):
        assert sentence in text


def test_the_page_is_part_of_the_package() -> None:
    page = resources.files("ksmdist.report").joinpath("page")
    names = {item.name for item in page.iterdir()}
    assert names == {"page.html", "page.css", "page.js", "charts.js", "tables.js", "whatif.js"}
