"""What a run found, on a screen, as JSON, as metrics: short, true to the tables, whatever the run."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

import ksmdist
from ksmdist import report, store
from ksmdist.report.prometheus import expose
from ksmdist.report.summary import _passes, top_pairs
from ksmdist.tables import CONTENTS, COUNTERS, EXPOSURE, HUGE, IMAGES, PASSES, POLICY, SHARING, SPECTRUM_BUCKETS

from .conftest import PAGE, ZERO, MakeImage, Row, arrow_image, elf_core, eligible, page, printed

FILLED = b"\x6b" * PAGE


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of two tenants, with a huge page, regions, and pages that are not eligible."""
    folder = tmp_path_factory.mktemp("report")
    images = []
    for name, tenant, own in (("a", "red", 10), ("b", "red", 20), ("c", "blue", 30)):
        contents = [ZERO] * 6 + [FILLED] * 3 + [page(1)] * 2 + [page(own), page(own), page(own + 1)]
        rows: list[Row] = [(at * PAGE, content, eligible(), None, "[heap]", 0) for at, content in enumerate(contents)]
        rows += [(1 << 21 | at * PAGE, page(own + 2 + at), eligible("huge"), None, None, 0) for at in range(3)]
        rows.append((1 << 22, page(1), 0, None, "/lib", 0))
        metadata = {"ksmdist.image_id": name, "ksmdist.tenant": tenant}
        images.append(arrow_image(folder / f"{name}.arrow", rows, metadata))
    ksmdist.run(images, folder / "run")
    return folder / "run"


def table(run: Path, definition: Any) -> list[dict[str, Any]]:
    return list(store.read_table(run, definition).to_pylist())


def test_json_is_what_the_tables_say(run: Path) -> None:
    found = json.loads(printed("report", run, "--json"))
    summary = json.loads((run / "run.json").read_text())["summary"]
    assert found["run"] == str(run)
    assert found["complete"] is True
    assert {name: found[name] for name in ("pages", "kinds", "merges", "settings")} == {
        name: summary[name] for name in ("pages", "kinds", "merges", "settings")
    }
    assert found["counters"] == table(run, COUNTERS)
    assert found["policy"] == table(run, POLICY)
    assert found["spectrum_buckets"] == table(run, SPECTRUM_BUCKETS)
    assert found["top_contents"] == [row | {"digest": row["digest"].hex()} for row in table(run, CONTENTS)[:10]]
    assert len(found["top_contents"]) == 6

    savings = found["savings"]
    assert savings["saved_bytes"] == summary["merges"]["saved_bytes"]
    assert savings["saved_pages"] * PAGE == savings["saved_bytes"]
    for name in ("pages", "zero", "same_filled", "other", "bytes"):
        parts = [savings[f"{where}_images_saved_{name}"] for where in ("within", "between")]
        assert sum(parts) == savings[f"saved_{name}"]
        assert min(parts) >= 0
    assert savings["saved_pages"] == sum(savings[f"saved_{kind}"] for kind in ("zero", "same_filled", "other"))
    # 18 zero, 9 filled, 6 of all three, and a pair in each: a frame is kept for each content.
    assert (savings["saved_zero"], savings["saved_same_filled"], savings["saved_other"]) == (17, 8, 5 + 3)
    assert savings["within_images_saved_pages"] == 3 * (5 + 2 + 1 + 1)

    pairs = [row for row in table(run, SHARING) if row["image"] != row["other"]]
    pairs.sort(key=lambda row: -(row["pages"] + row["other_pages"]))
    assert found["top_pairs"] == pairs
    huge = table(run, HUGE)
    assert found["huge"]["frames"] == sum(row["frames"] for row in huge) == 6
    assert found["huge"]["huge_frames"] == 3
    assert found["huge"]["mergeable_frames"] == 3
    assert found["huge"]["mergeable_huge_frames"] == 0
    assert found["passes"] is None
    assert all(identity["holds"] for identity in found["identities"])


def test_one_image_fits_an_old_terminal(make_raw: MakeImage, tmp_path: Path) -> None:
    pages = [ZERO] * 100
    for number in range(9):  # each bucket of the spectrum has something
        pages += [page(1000 * number + at) for at in range(3)] * (1 << number)
    ksmdist.run([make_raw("guest.raw", pages)], tmp_path / "run")
    lines = printed("report", tmp_path / "run").splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for said in (
        "% of the merged pages are zero pages",
        "32+",
        "not zero",
        "everything",
        "zero page",
        "identities hold",
    ):
        assert said in text, said
    assert "INCOMPLETE" not in text
    rows = {line.split()[0]: line.split() for line in lines if re.match(r" +\d+\+? ", line)}
    assert rows["8"][1:3] == ["3", "24"]
    assert rows["32+"][1:3] == ["12", f"{3 * (32 + 64 + 128 + 256):,}"]


def test_people_see_what_tables_say(run: Path) -> None:
    shown = printed("report", run)
    lines = shown.splitlines()
    assert "KSM would save 132.0 KiB of 216.0 KiB" in shown
    at = next(number for number, line in enumerate(lines) if "within images" in line)
    assert re.findall(r"[\d.]+ KiB", lines[at + 1]) == [
        f"{kib} KiB" for kib in ("132.0", "68.0", "32.0", "32.0", "108.0", "24.0")
    ]
    assert (
        "2.0 MiB frames: 3 of 6 have a page that is zero or has a copy elsewhere; 0 are full of zeros; of 3 that are "
        "huge pages 0 have one"
    ) in " ".join(shown.split())
    assert "0x6b..: SLUB poison" in shown
    assert re.search(r"^a +b +\d", shown, re.M)


def test_the_screen_holds_whatever_the_run(run: Path) -> None:
    found = json.loads(printed("report", run, "--json"))
    long = "\x1b[31m" + "very-long/" * 40 + "\n\u202e"
    pair = found["top_pairs"][0] | {"image_id": long, "other_id": long, "contents": 10**12, "pages": 10**13}
    content = found["top_contents"][0] | {"first_image": long, "region": long, "copies": 10**12, "kind": "other"}
    content |= {"fill_word": None, "what": "text", "meaning": long}
    kinds = [dict.fromkeys(EXPOSURE.schema.names, 10**12) | {"kind": "other"}]
    exposed = {"tenant": long, "other": long, "kinds": kinds}
    bucket = {"kind": "other", "contents": 10**11, "pages": 10**13, "pages_bytes": 10**16, "contents_bytes": 10**15}
    found |= {
        "complete": False,
        "top_pairs": [pair] * 10,
        "top_contents": [content] * 10,
        "spectrum_buckets": [bucket | {"copies": 1 << number} for number in range(40)],
        "policy": [row | {"saved_gib": 123456789.123, "cost_gib": 123456789.123} for row in found["policy"]],
        "caveats": [long] * 1000,
        "holes": {"pages": 10**12, "ranges": 10**9, "images": [long] * 1000},
        "pages": found["pages"] | {"zero_mapped_fault": 10**12},
        "merges": found["merges"] | {"thp_zero": 10**12},
        "exposure": found["exposure"]
        | {"tenants": 10**6, "pairs": 10**12, "salts": 10**6, "top": [exposed] * 10}
        | {"rare": dict.fromkeys(found["exposure"]["rare"], 10**12) | {"contents": 10**13}},
        "passes": dict.fromkeys(("pages", "changed", "appeared", "gone", "passes", "saved_bytes_lost"), 10**12),
        "identities": [*found["identities"], {"name": "x", "left": 1, "right": 2, "holds": False}],
    }
    out = StringIO()
    report.render_summary(found, out)
    lines = out.getvalue().splitlines()
    assert len(lines) <= 58
    assert max(map(len, lines)) <= 100
    assert all(char.isprintable() or char == "\n" for char in out.getvalue())
    assert lines[1].endswith("INCOMPLETE: see below.")
    text = " ".join(" ".join(lines).split())
    assert "INCOMPLETE: 1,000,000,000,000 pages in 1,000,000,000 ranges could not be read" in text
    assert "INCOMPLETE: 1,000 images were out of reach" in text
    assert "FAILED: " in text


def test_holes_are_said(tmp_path: Path) -> None:
    (tmp_path / "core").write_bytes(elf_core([(0, page(1) + page(2), 2 * PAGE)])[:-PAGE])
    ksmdist.run([tmp_path / "core"], tmp_path / "run")
    shown = printed("report", tmp_path / "run")
    assert "INCOMPLETE: see below." in shown.splitlines()[0] + " " + shown.splitlines()[1]
    assert "INCOMPLETE: 1 pages in 1 ranges could not be read and are not counted" in shown
    assert json.loads(printed("report", tmp_path / "run", "--json"))["complete"] is False
    assert "\nksmdist_run_holes 1\n" in printed("report", tmp_path / "run", "--prometheus")


def test_pages_that_change_between_passes(make_raw: MakeImage, tmp_path: Path) -> None:
    pages = [ZERO] * 4 + [page(1)] * 2 + [page(2), page(3)]
    ksmdist.run([make_raw("a.raw", pages)], tmp_path / "first", ksmdist.Settings(checksums=True))
    image = make_raw("a.raw", [*pages[:6], page(1), page(4)])
    ksmdist.run([image], tmp_path / "second", previous=tmp_path / "first")
    found = json.loads(printed("report", tmp_path / "second", "--json"))
    assert [row["volatile"] for row in found["counters"]] == ["excluded", "included"]
    assert found["passes"] == {
        "pages": 8,
        "changed": 2,
        "appeared": 0,
        "gone": 0,
        "stable": 6,
        "passes": 2,
        "images": 1,
        "saved_bytes_lost": PAGE,
    }
    shown = " ".join(printed("report", tmp_path / "second").split())
    assert "volatile: of 8 pages in the last of 2 passes 2 changed since the one before" in shown
    assert "4.0 KiB more would be saved" in shown
    samples = parsed(printed("report", tmp_path / "second", "--prometheus"))
    assert samples["ksmdist_content_merges"] == {'volatile="excluded"': 2, 'volatile="included"': 3}
    assert samples["node_ksmd_pages_volatile"] == {"": 2}


def test_top_pairs_are_those_of_the_whole_table() -> None:
    rows: list[dict[str, Any]] = [
        {
            "image": image,
            "image_id": f"i{image}",
            "other": other,
            "other_id": f"i{other}",
            "contents": 1,
            "pages": (7 * image + other) % 5,
            "other_pages": image % 3,
        }
        for image in range(9)
        for other in range(image, 9)
    ]
    whole = pa.Table.from_pylist(rows, schema=SHARING.schema)
    pairs = [row for row in rows if row["image"] != row["other"] and row["pages"] + row["other_pages"]]
    wanted = sorted(pairs, key=lambda row: -(row["pages"] + row["other_pages"]))[:6]
    for cut in (1, 4, 1000):
        assert top_pairs(whole.to_batches(max_chunksize=cut), 6) == wanted


@pytest.mark.parametrize("page_size", [4096, 65536])
def test_a_huge_page_is_what_a_page_of_entries_maps(tmp_path: Path, page_size: int) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(page_size * 3) + bytes([1]) * page_size)
    ksmdist.run([tmp_path / "a.raw"], tmp_path / "run", ksmdist.Settings(page_size=page_size))
    found = json.loads(printed("report", tmp_path / "run", "--json"))
    assert found["huge"]["frame_bytes"] == page_size * page_size // 8
    size = {4096: "2.0 MiB", 65536: "512.0 MiB"}[page_size]
    assert f"{size} frames: 1 of 1 have a page that is zero or has a copy elsewhere" in " ".join(
        printed("report", tmp_path / "run").split()
    )
    printed("report", tmp_path / "run", "--html", tmp_path / "x")
    assert f"1 of 1 aligned frames of {size} (100.0 %) have a page that is zero or has" in (tmp_path / "x").read_text()


def test_a_lone_zero_page_is_not_said_to_merge(tmp_path: Path) -> None:
    flags = eligible("huge")
    image = arrow_image(tmp_path / "a.arrow", [(0, ZERO, flags), (PAGE, page(1), flags)])
    ksmdist.run([image], tmp_path / "run")
    shown = " ".join(printed("report", tmp_path / "run").split())
    assert "KSM would save nothing" in shown
    assert "1 of 1 have a page that is zero or has a copy elsewhere" in shown
    assert "of 1 that are huge pages 1 have one" in shown
    printed("report", tmp_path / "run", "--html", tmp_path / "x")
    text = (tmp_path / "x").read_text()
    section = text[text.index('<section id="huge"') :]
    section = section[: section.index("</section>")]
    assert "1 of 1 frames that the images mark as huge pages have such a page." in section
    for said in (shown, section, printed("report", tmp_path / "run", "--prometheus")):
        assert not re.search("that merges[;,.]|merging splits|would merge|would be split", said)


def test_passes_are_counted_image_by_image() -> None:
    rows = [
        {"image": image, "image_id": f"i{image}", "pass": number, "pages": 8, "stable": 8}
        for image, numbers in ((0, (1, 2)), (1, (3, 4)), (2, (2,)))
        for number in numbers
    ]
    counters: list[dict[str, Any]] = [{"volatile": "excluded", "saved_bytes": 5}]
    found = _passes(pa.Table.from_pylist(rows, schema=PASSES.schema), counters)
    assert found is not None
    assert (found["passes"], found["images"]) == (2, 3)


# Prometheus


def parsed(text: str) -> dict[str, dict[str, float]]:
    """Samples by metric and labels, by the rules of the exposition format 0.0.4 that matter here, strictly."""
    assert text.endswith("\n")
    found: dict[str, dict[str, float]] = {}
    name = ""
    lines = text.split("\n")[:-1]
    for number, line in enumerate(lines):
        if line.startswith("# HELP "):
            name, doc = line[7:].split(" ", 1)
            assert re.fullmatch(r"[a-z_:][a-z0-9_:]*", name)
            assert name not in found, "a metric stands once, with all its samples"
            assert doc
            assert re.fullmatch(rf"# TYPE {name} (gauge|counter)", lines[number + 1])
            found[name] = {}
        elif not line.startswith("# TYPE "):
            match = re.fullmatch(
                rf'{name}(?:\{{((?:[a-z_]+="(?:[^"\\]|\\["\\n])*",?)+)\}})? (-?\d+(?:\.\d+)?(?:e-?\d+)?)', line
            )
            assert match, line
            labels = match[1] or ""
            assert labels not in found[name]
            found[name][labels] = float(match[2])
    assert all(found.values()), "a metric without samples has no heading"
    return found


def test_metrics_are_what_the_tables_say(run: Path) -> None:
    text = printed("report", run, "--prometheus")
    samples = parsed(text)
    (counters,) = table(run, COUNTERS)
    node = {name.removeprefix("node_ksmd_") for name in samples if name.startswith("node_ksmd_")}
    names = "merge_across_nodes pages_shared pages_sharing pages_to_scan pages_unshared pages_volatile run"
    assert node == {"full_scans_total", "general_profit_bytes", "sleep_seconds", *names.split()}
    for name in ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile"):
        assert samples[f"node_ksmd_{name}"] == {"": counters[name]}
    assert samples["node_ksmd_sleep_seconds"] == {"": 0.02}
    for name in ("zero_merges", "content_merges", "saved_bytes", "ksm_zero_pages", "rmap_items"):
        assert samples[f"ksmdist_{name}"] == {'volatile="excluded"': counters[name]}, name
    assert samples["ksmdist_policy_saved_bytes"] == {
        f'policy="{row["policy"]}"': row["saved_bytes"] for row in table(run, POLICY)
    }
    images = table(run, IMAGES)
    for row in images:
        assert samples["ksmdist_image_pages"][f'image_id="{row["image_id"]}",class="zero"'] == row["zero"]
    assert sum(samples["ksmdist_saved_pages"].values()) == counters["saved_bytes"] / PAGE
    assert samples["ksmdist_identities"] == samples["ksmdist_identities_holding"]

    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["node_ksmd_full_scans"].type == "counter"
    assert families["node_ksmd_pages_shared"].documentation == "How many shared pages are being used."
    assert sum(len(family.samples) for family in families.values()) == sum(map(len, samples.values()))


def test_metrics_of_the_run_have_the_same_names_and_help(run: Path) -> None:
    def headings(text: str) -> dict[str, str]:
        return dict(line[7:].split(" ", 1) for line in text.splitlines() if line.startswith("# HELP "))

    ran, found = headings((run / "metrics.prom").read_text()), headings(printed("report", run, "--prometheus"))
    assert set(ran) & set(found) == {"ksmdist_run_pages", "ksmdist_run_holes", "ksmdist_run_images_out_of_reach"}
    assert all(found[name] == ran[name] for name in set(ran) & set(found))


def test_what_is_not_known_has_no_sample(run: Path, make_raw: MakeImage, tmp_path: Path) -> None:
    samples = parsed(printed("report", run, "--prometheus"))
    assert "ksmdist_pages_scanned" not in samples
    ksmdist.run([make_raw("a.raw", [ZERO] * 3)], tmp_path / "old", ksmdist.Settings(kernel="6.1", use_zero_pages=True))
    old = parsed(printed("report", tmp_path / "old", "--prometheus"))
    (counters,) = table(tmp_path / "old", COUNTERS)
    assert counters["ksm_zero_pages"] is None
    assert "ksmdist_ksm_zero_pages" not in old
    assert ("node_ksmd_general_profit_bytes" in old) == (counters["general_profit"] is not None)


def test_labels_are_escaped(run: Path) -> None:
    found = json.loads(printed("report", run, "--json"))
    names = ['quote " and \\ and', "two\nlines", "{},=", "ü"]
    row = table(run, IMAGES)[0]
    images = pa.Table.from_pylist(
        [row | {"image_id": name, "unreadable": None} for name in names], schema=IMAGES.schema
    )
    text = expose(found, images)
    parsed(text)
    (family,) = (f for f in text_string_to_metric_families(text) if f.name == "ksmdist_image_pages")
    assert list(dict.fromkeys(sample.labels["image_id"] for sample in family.samples)) == names
    assert not any(sample.labels["class"] == "unreadable" for sample in family.samples)
