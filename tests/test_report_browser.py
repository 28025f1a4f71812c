"""The report's page in a browser: it draws, its controls and tables work, and it can be read by anyone."""

from __future__ import annotations

import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ksmdist.report.markup import plain
from ksmdist.report.terminal import headline

from .report_runs import HOSTILE, finished_run, incomplete, made_up, number, of_run, render

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def fleet() -> str:
    """The page of 10,000 images, of which each shares with 200."""
    return render(made_up(10_000, partners=200))


Opened = Callable[..., AbstractContextManager["Page"]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The Chromium that is installed."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        reason = "Chromium is not installed"
        if os.environ.get("KSMDIST_FORCE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(f"{reason}; KSMDIST_FORCE_BROWSER=1 makes this a failure")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Opened:
    """Open a page's text from a file, the network off; fails if it fetches, complains or asks anything."""

    @contextmanager
    def opened(text: str, wait: bool = True, **context: Any) -> Iterator[Page]:
        file = tmp_path / "report.html"
        file.write_text(text, encoding="utf-8")
        told: list[str] = []
        fetched: list[str] = []

        def dismiss(dialog: Dialog) -> None:
            told.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        with browser.new_context(**context) as held:
            held.set_offline(True)
            shown = held.new_page()
            shown.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
            shown.on("pageerror", lambda error: told.append(f"error: {error}"))
            shown.on("dialog", dismiss)
            shown.on("request", lambda request: fetched.append(request.url))
            shown.goto(file.as_uri())
            if wait:
                shown.locator("html[data-ready=true]").wait_for(state="attached")
            yield shown
        assert told == []
        assert set(fetched) == {file.as_uri()}

    return opened


KNOBS = ("accounting", "max_page_sharing", "merge_across_nodes")
CHARTS = {"split", "policy", "spectrum", "heat", "cumulative", "whatif", "huge"}


@pytest.mark.browser
def test_it_opens_with_the_network_off_and_draws_all(finished: Path, opened: Opened) -> None:
    with opened(render(of_run(finished))) as shown:
        drawn = shown.locator("[data-chart]:has(svg)").evaluate_all("all => all.map(each => each.dataset.chart)")
        assert set(drawn) == CHARTS
        marks = shown.locator("[data-chart=split] svg .mark-rect path").count()
        assert marks >= 6
        assert shown.locator("h1").inner_text() == "ksmdist report"


@pytest.mark.browser
def test_the_sliders_show_each_row_of_the_parquet(finished: Path, opened: Opened) -> None:
    run = of_run(finished)
    rows = run.rows("whatif")
    limits = sorted({row["max_page_sharing"] for row in rows}, key=lambda limit: (limit is None, limit or 0))
    now = next(row for row in rows if row["present"])
    with opened(render(run)) as shown:
        slider, said = shown.locator("#limit"), shown.locator("#whatif-said")
        assert "the settings of the run" in said.inner_text()
        slider.focus()
        slider.press("Home")
        before = said.inner_text()
        for step, limit in enumerate(limits):
            assert slider.input_value() == str(step)
            text = "unlimited" if limit is None else f"{limit:,}"
            assert slider.get_attribute("aria-valuetext") == text
            assert shown.locator("#limit-shown").inner_text() == text
            for use_zero in (False, True):
                shown.locator("#use-zero-pages").set_checked(use_zero)
                for across in (False, True):
                    shown.locator("#merge-across-nodes").set_checked(across)
                    accounting = "pte_dirty" if use_zero else "stable_tree"
                    wanted = (accounting, limit, across)
                    (row,) = (row for row in rows if tuple(row[knob] for knob in KNOBS) == wanted)
                    shown_rows = shown.locator("#whatif-now tbody tr").evaluate_all(
                        "all => all.map(each => [...each.cells].map(cell => cell.textContent))"
                    )
                    for name, tried, present, by in shown_rows:
                        assert number(tried.split(" (")[0]) == row[name], (name, wanted)
                        assert number(present.split(" (")[0]) == now[name]
                        if row[name] is not None and now[name] is not None:
                            assert number(by.split(" (")[0].lstrip("+")) == row[name] - now[name]
            slider.press("ArrowRight")
        assert said.inner_text() != before
        shown.locator("#use-zero-pages").set_checked(True)
        shown.locator("#accounting").select_option("untracked")
        counted = shown.locator("tr[data-figure=zero_pages_counted] td").first
        assert counted.inner_text() == "?"
        shown.locator("#to-best").click()
        assert "the best for this kernel" in said.inner_text()
        shown.locator("#to-present").click()
        assert "the settings of the run" in said.inner_text()


@pytest.mark.browser
def test_contents_are_sorted_searched_and_leafed_through_by_keyboard(opened: Opened) -> None:
    from playwright.sync_api import expect

    run = made_up(4)
    contents = run.rows("contents")
    with opened(render(run)) as shown:
        place = shown.locator("[data-grid=contents]")
        head, cells = place.locator("thead button"), place.locator("tbody tr td:first-child")
        assert cells.all_inner_texts() == [f"{rank}" for rank in range(1, 21)]
        place.get_by_role("button", name="next rows of").focus()
        shown.keyboard.press("Enter")
        assert cells.first.inner_text() == "21"
        names = [name.strip() for name in head.all_inner_texts()]
        images = head.nth(names.index("images"))
        images.focus()
        shown.keyboard.press("Enter")
        assert images.locator("xpath=..").get_attribute("aria-sort") == "descending"
        shown.keyboard.press("Enter")
        assert images.locator("xpath=..").get_attribute("aria-sort") == "ascending"
        fewest = sorted(contents, key=lambda row: (row["images"], row["rank"]))
        assert cells.all_inner_texts() == [f"{row['rank']:,}" for row in fewest[:20]]
        digest = contents[500]["digest"].hex()[:16]
        place.get_by_role("searchbox").fill(digest[:12])
        expect(place.locator("tbody tr")).to_have_count(1)
        assert cells.all_inner_texts() == ["501"]
        assert "1 to 1 of 1 rows that match, of 1,000" in place.get_by_role("status").inner_text()
        place.get_by_role("searchbox").fill("no such content")
        expect(place.locator("tbody tr")).to_have_count(0)
        assert "No row matches" in place.get_by_role("status").inner_text()


@pytest.mark.browser
def test_ten_thousand_images_can_be_found(fleet: str, opened: Opened) -> None:
    from playwright.sync_api import expect

    with opened(fleet) as shown:
        place = shown.locator("[data-grid=images]")
        assert "1 to 20 of 10,000 rows" in place.get_by_role("status").inner_text()
        place.get_by_role("button", name="last rows of").click()
        assert place.locator("tbody tr").last.locator("td").nth(1).inner_text() == "web-09999.prod"
        place.get_by_role("searchbox").fill("web-01234")
        expect(place.locator("tbody tr")).to_have_count(1)
        row = made_up(10_000).rows("images")[1234]
        cells = place.locator("tbody td").all_inner_texts()
        assert {f"{row[name]:,}" for name in ("total", "zero", "duplicate", "unique")} <= set(cells)


@pytest.mark.browser
def test_names_from_images_run_nothing_and_are_shown(opened: Opened) -> None:
    with opened(render(incomplete(made_up(9, names=HOSTILE)))) as shown:
        for behind in shown.locator("details").all():
            behind.evaluate("each => { each.open = true; }")
        assert shown.locator("img, iframe").count() == 0
        names = shown.locator("[data-grid=images] tbody td:nth-child(2)").all_inner_texts()
        assert names[: len(HOSTILE)] == [plain(name) for name in HOSTILE]
        shown.locator("[data-chart=heat] svg .mark-rect path").first.hover()
        assert shown.locator("#tip").inner_text().startswith(HOSTILE[0])


@pytest.mark.browser
def test_every_plot_has_a_table_and_every_control_a_name(finished: Path, opened: Opened) -> None:
    from playwright.sync_api import expect

    with opened(render(of_run(finished))) as shown:
        for chart in shown.locator("[data-chart]").all():
            assert chart.get_attribute("role") == "img"
            assert chart.get_attribute("aria-label")
            assert chart.locator("xpath=ancestor::section[1]").locator("table, [data-grid]").count() > 0
        for behind in shown.locator("details").all():
            behind.evaluate("each => { each.open = true; }")
        expect(shown.locator("[data-grid]:has(table)")).to_have_count(shown.locator("[data-grid]").count())
        assert shown.locator("table:not(:has(caption))").count() == 0
        assert shown.locator("th:not([scope])").count() == 0
        tree = shown.locator("main").aria_snapshot()
        for expected in (
            'slider "max_page_sharing"',
            'checkbox "use_zero_pages"',
            'combobox "zero pages are"',
            'searchbox "search"',
            'region "Who shares with whom"',
            'table "Counters"',
            'rowheader "pages_sharing"',
        ):
            assert expected in tree, expected
        assert not re.search(r"- (button|slider|checkbox|searchbox|combobox|img)(:|$| \[)", tree, re.M)


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def pixels(png: bytes) -> set[bytes]:
    """Different rows of a picture, as the file has them."""
    (height,) = struct.unpack(">I", png[20:24])
    chunks, at = b"", 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        chunks += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    raw = zlib.decompress(chunks)
    row = len(raw) // height
    return {raw[i : i + row] for i in range(0, len(raw), row)}


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 375])
def test_it_is_legible_in_light_and_dark_wide_and_narrow(opened: Opened, scheme: str, width: int) -> None:
    run = incomplete(made_up(9, names=HOSTILE, several_passes=True))
    with opened(render(run), color_scheme=scheme, viewport={"width": width, "height": 800}) as shown:
        for behind in shown.locator("details").all():
            behind.evaluate("each => { each.open = true; }")
        wide = shown.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0
        assert len(pixels(shown.screenshot(full_page=True))) > 500
        colors = shown.evaluate(
            """() => Object.fromEntries(["paper", "ink", "soft", "panel", "link", "warn", "warn-ink", "mark", "zero",
              "same-filled", "other", "line"].map(name => {
                const probe = document.body.appendChild(document.createElement("i"));
                probe.style.color = `var(--${name})`;
                const color = getComputedStyle(probe).color;
                probe.remove();
                return [name, color];
              }))"""
        )
        assert (luminance(colors["paper"]) > 0.5) == (scheme == "light")
        for text, ground in (
            ("ink", "paper"), ("soft", "paper"), ("link", "paper"), ("ink", "panel"), ("soft", "panel"),
            ("ink", "mark"), ("warn-ink", "warn"),
        ):  # fmt: skip
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
        for drawn in ("zero", "same-filled", "other", "line"):
            assert contrast(colors[drawn], colors["paper"]) >= 3, drawn


@pytest.mark.browser
def test_print_has_all_tables_and_no_controls(opened: Opened) -> None:
    from playwright.sync_api import expect

    with opened(render(made_up(4)), color_scheme="dark") as shown:
        pages = len(re.findall(rb"/Type /Page\b", shown.pdf(prefer_css_page_size=True)))
        assert pages >= 4
        shown.emulate_media(media="print")
        shown.evaluate("dispatchEvent(new Event('beforeprint'))")
        expect(shown.locator("[data-grid]:has(table)")).to_have_count(shown.locator("[data-grid]").count())
        assert shown.locator("#whatif-table").is_visible()
        assert not shown.locator("#whatif-controls").is_visible()
        assert not shown.locator("[data-grid=contents] .tools").is_visible()
        assert shown.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        shown.evaluate("dispatchEvent(new Event('afterprint'))")
        assert shown.locator("details[open]").count() == 0


@pytest.mark.browser
def test_without_a_script_the_answers_are_there(finished: Path, opened: Opened) -> None:
    run = of_run(finished)
    with opened(render(run), wait=False, java_script_enabled=False) as shown:
        assert shown.get_by_text(headline(run.manifest["summary"])).is_visible()
        assert shown.get_by_text("Scripts are off").is_visible()
        for name in ("split-table", "policy-table", "counters-table", "settings-table", "checks-table"):
            assert shown.locator(f"#{name}").is_visible()
        assert not shown.locator("#whatif-controls").is_visible()
