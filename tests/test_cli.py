"""The program as a person meets it: output, exit codes, errors of one line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ksmdist.sysfs import Ksm

from .conftest import PAGE, ZERO, MakeImage, arrow_image, elf_core, page
from .targets import Start, linux, root


def ksmdist(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "ksmdist", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_json_is_the_promised_object(make_raw: MakeImage, tmp_path: Path) -> None:
    done = ksmdist("run", make_raw("a.raw", [ZERO, ZERO, page(1), None]), "-o", tmp_path / "out", "--json")
    assert done.returncode == 0
    stages = [line.split(":")[:2] for line in done.stderr.splitlines()]
    assert stages == [
        ["ksmdist", f" {stage}"] for stage in ("open", "engine", "start", "scan", "confirm", "merge", "relate", "count")
    ]
    printed = json.loads(done.stdout)
    promised = {
        "pages": "total absent ineligible zero_mapped_fault zero_mapped_ksm volatile zero duplicate unique",
        "kinds": "zero same_filled other",
        "contents": "distinct shared max_copies",
        "merges": "zero content saved_bytes",
        "counters": "pages_shared pages_sharing pages_unshared pages_volatile ksm_zero_pages stable_node_chains "
        "stable_node_dups rmap_items general_profit",
    }
    for key, names in promised.items():
        assert set(names.split()) <= set(printed[key]), key
    assert printed["engine"] == "inline"
    assert printed["run"] == str(tmp_path / "out")
    assert printed["settings"]["max_page_sharing"] == 256
    assert printed["pages"]["absent"] == 1


def test_the_table_answers_first(make_raw: MakeImage, tmp_path: Path) -> None:
    image = make_raw("a.raw", [ZERO, ZERO, ZERO, page(1), page(1), page(2)])
    done = ksmdist("run", image, "-o", tmp_path / "out", "--use-zero-pages")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == (
        "KSM would save 16.0 KiB of 24.0 KiB (66.7 %); 60.0 % of the merged pages are zero pages."
    )
    assert "ksm_zero_pages" in done.stdout
    assert "engine: inline" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.raw", "-o", "out"], 1, "none.raw: cannot be opened: No such file or directory"),
        (["odd.raw", "-o", "out"], 10, "odd.raw: is not a memory image"),
        (["good.raw", "-o", "full"], 11, "full: exists and is not an empty directory"),
        (["good.raw", "-o", "no/such/place"], 11, "no/such/place: cannot be made"),
        (["good.raw", "-o", "out", "--page-size", "5000"], 2, "page_size: 5000 is no page size"),
        (["good.raw", "-o", "out", "--max-page-sharing", "1"], 2, "max_page_sharing"),
        (["good.raw", "-o", "out", "--eligible", "some"], 2, "eligible"),
        (["good.raw", "-o", "out", "--engine", "spark"], 2, "engine"),
        (["good.raw"], 2, "Missing option"),
    ],
)
def test_errors_are_one_clear_line(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    (tmp_path / "good.raw").write_bytes(ZERO)
    (tmp_path / "odd.raw").write_bytes(b"odd")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    done = ksmdist("run", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if code != 2:
        assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_holes_are_said_and_end_with_3(tmp_path: Path) -> None:
    (tmp_path / "core").write_bytes(elf_core([(0, page(1) + page(2), 2 * PAGE)])[:-PAGE])
    done = ksmdist("run", tmp_path / "core", "-o", tmp_path / "out")
    assert done.returncode == 3
    assert done.stdout.splitlines()[0].endswith("INCOMPLETE: see below.")
    assert "INCOMPLETE: 1 pages in 1 ranges" in done.stdout
    assert "holes.parquet" in done.stderr


def test_nothing_is_said_of_images_that_are_out_of_reach(tmp_path: Path) -> None:
    done = ksmdist("run", "node://nowhere/x.raw", "-o", tmp_path / "out")
    assert done.returncode == 3
    assert done.stdout.startswith("No page could be read: nothing is known of these images. INCOMPLETE: see below.\n")
    assert "node://nowhere/x.raw" in done.stderr
    planned = ksmdist("plan", "node://nowhere/x.raw", "--json")
    assert planned.returncode == 3
    assert json.loads(planned.stdout)["out_of_reach"] == ["node://nowhere/x.raw"]
    assert "they are not in this plan" in planned.stderr


def test_import_then_run(make_raw: MakeImage, tmp_path: Path) -> None:
    raw = make_raw("guest.raw", [ZERO, page(1), None, page(1)])
    assert ksmdist("import", raw, "-o", tmp_path / "guest.arrow").returncode == 0
    done = ksmdist("run", tmp_path / "guest.arrow", "-o", tmp_path / "out", "--json")
    assert json.loads(done.stdout)["pages"]["absent"] == 1
    again = ksmdist("import", raw, "-o", tmp_path / "guest.arrow")
    assert again.returncode == 11
    several = tmp_path / "several"
    several.mkdir()
    made = ksmdist("import", raw, make_raw("other.raw", [page(3)]), "-o", several)
    assert made.returncode == 0, made.stderr
    assert sorted(path.name for path in several.iterdir()) == ["guest.arrow", "other.arrow"]
    bad = ksmdist("import", raw, make_raw("third.raw", [page(3)]), "-o", tmp_path / "both.arrow")
    assert (bad.returncode, (tmp_path / "both.arrow").exists()) == (10, False)


def test_schema_is_enough_to_write_an_image(tmp_path: Path) -> None:
    schema = json.loads(ksmdist("schema", "memory_image").stdout)
    assert schema["columns"][2]["bits"]["eligible"] == 1
    assert {schema["name"] for schema in json.loads(ksmdist("schema").stdout)} >= {"memory_image", "stable_tree"}
    assert ksmdist("schema", "nothing").returncode == 2
    image = arrow_image(tmp_path / "x.arrow", [(0, page(1), schema["columns"][2]["bits"]["eligible"])])
    assert ksmdist("run", image, "-o", tmp_path / "out").returncode == 0


def test_demo_looks_real_and_can_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        done = ksmdist("demo", tmp_path / "demo", "--json")
        assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert 0.35 < summary["pages"]["zero"] / summary["pages"]["total"] < 0.40
    assert summary["pages"]["absent"] == 3 * 1024
    assert summary["kinds"]["same_filled"] == 120
    assert summary["merges"]["content"] > 2500


@pytest.fixture
def two_runs(make_raw: MakeImage, tmp_path: Path) -> Path:
    pages = [ZERO] * 6 + [page(1)] * 5 + [page(2), None]
    done = ksmdist("run", make_raw("a.raw", pages), make_raw("b.raw", [ZERO, page(1)]), "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def test_whatif_names_the_best_and_asks_no_image(two_runs: Path) -> None:
    for image in two_runs.parent.glob("*.raw"):
        image.unlink()
    done = ksmdist("whatif", two_runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Best: use_zero_pages=1, max_page_sharing=256, merge_across_nodes=1: ")
    for said in ("more than now", "* the present setting", "rmap_tracked", "given back", "read faults"):
        assert said in done.stdout, said
    told = json.loads(ksmdist("whatif", two_runs, "--json").stdout)
    assert len(told["grid"]) == 70
    assert told["best"]["use_zero_pages"]
    assert told["present"]["general_profit"] == told["counters"]["general_profit"]


def test_whatif_for_one_setting(two_runs: Path) -> None:
    asked = ["--use-zero-pages", "--max-page-sharing", "unlimited", "--full-scans", "5", "--smart-scan"]
    told = json.loads(ksmdist("whatif", two_runs, *asked, "--json").stdout)
    assert told["settings"]["max_page_sharing"] is None
    assert (told["counters"]["ksm_zero_pages"], told["counters"]["pages_skipped"]) == (7, 1)
    assert [row["image_id"] for row in told["processes"]] == ["a", "b"]
    shown = ksmdist("whatif", two_runs, *asked, "--pages-to-scan", "0").stdout
    assert "max_page_sharing=unlimited" in shown
    assert "never, as pages_to_scan is 0" in shown
    assert ksmdist("whatif", two_runs, "--max-page-sharing", "many").returncode == 2
    assert ksmdist("whatif", two_runs, "--kernel", "5.4").returncode == 2
    assert ksmdist("whatif", two_runs.parent).returncode == 11


def test_explain_and_unmerge(two_runs: Path) -> None:
    shown = ksmdist("explain", two_runs).stdout
    assert shown.startswith("13 of 15 pages of address space are merged (86.7 %).")
    assert "no other page has its content" in shown
    one = json.loads(ksmdist("explain", two_runs, "--image", "b", "--region", "-", "--json").stdout)
    assert one["explain"] == [{"image_id": "b", "region": None, "reason": "merged", "pages": 2}]
    assert ksmdist("explain", two_runs, "--region", "[heap]").returncode == 2
    assert ksmdist("explain", two_runs, "--image", "c").returncode == 2
    shown = ksmdist("unmerge", two_runs, "--use-zero-pages").stdout
    assert shown.startswith("Unmerging everything (run=2) needs 12 frames, 48.0 KiB, for 13 pages.")
    shown = ksmdist("unmerge", two_runs, "--use-zero-pages", "--kernel", "6.1", "--image", "b").stdout
    assert "Unmerging b (MADV_UNMERGEABLE) needs 1 frames" in shown
    assert "1 pages stay on the shared zero page" in shown


@pytest.mark.parametrize(
    "command",
    [
        ["run", "a.raw", "-o", "again", "--quiet"],
        ["plan", "a.raw"],
        ["report", "run"],
        ["report", "run", "--prometheus"],
        ["whatif", "run"],
        ["whatif", "run", "--use-zero-pages"],
        ["explain", "run"],
        ["unmerge", "run"],
        ["diff", "run", "run"],
        ["query", "run", "select * from range(1000000000)"],
        ["query", "run", "select * from range(1000000000)", "--csv"],
        ["query", "run"],
        ["schema"],
        ["--help"],
    ],
    ids=" ".join,
)
def test_a_reader_that_leaves_is_no_error(two_runs: Path, command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with open(writing, "wb") as sink:
        done = subprocess.run(
            [sys.executable, "-m", "ksmdist", *command],
            stdout=sink,
            stderr=subprocess.PIPE,
            text=True,
            cwd=two_runs.parent,
            env=environment,
            timeout=120,
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_missing_is_said_to_a_reader_that_leaves(tmp_path: Path) -> None:
    (tmp_path / "core").write_bytes(elf_core([(0, page(1) + page(2), 2 * PAGE)])[:-PAGE])
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "ksmdist", "run", "core", "-o", "out", "--engine", "inline", "--quiet"]
    with open(writing, "wb") as sink:
        done = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr) == (3, "1 pages could not be read: out/holes.parquet lists them\n")
    with open(os.devnull, "wb") as nothing:  # and if nobody reads what went wrong, it went wrong all the same
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "wb") as sink:
            unheard = subprocess.run(command, stdout=nothing, stderr=sink, cwd=tmp_path, timeout=120)
    assert unheard.returncode == 11


def test_names_in_errors_are_fit_for_a_terminal(two_runs: Path) -> None:
    done = ksmdist("explain", two_runs, "--image", "x\x1b[31m\u202e")
    assert done.returncode == 2
    assert done.stderr.startswith("ksmdist: x?[31m?: is no image of this run; use one of a, b")


@linux
@root
def test_capture_run_and_explain_a_process(start: Start, tmp_path: Path) -> None:
    target = start('m = anon("m", 60, 15, 12)\nwrite(m, 0, 7, 20); write(m, 20, 0, 10); touch(m, 30, 40)')
    images = tmp_path / "images"
    done = ksmdist("capture", "--pid", str(target.pid), "-o", images, "--pause")
    assert done.returncode == 0, done.stderr
    (image,) = images.iterdir()
    assert done.stdout.startswith(f"{image}: image {image.stem}, ")
    assert ksmdist("capture", "--pid", str(target.pid), "-o", images).returncode == 11
    told = json.loads(ksmdist("run", image, "-o", tmp_path / "run", "--json").stdout)
    assert told["merges"]["zero"] == 10
    assert told["merges"]["content"] == 20
    assert told["physical"]["frames_saved"] == 28
    assert told["processes"][0]["ksm_merging_pages"] == 30
    whole = json.loads(ksmdist("run", image, "-o", tmp_path / "all", "--json", "--eligible", "all").stdout)
    assert whole["pages"]["ineligible"] < told["pages"]["ineligible"]
    reasons = json.loads(ksmdist("explain", tmp_path / "run", "--region", "[anon]", "--json").stdout)["explain"]
    found = {row["reason"]: row["pages"] for row in reasons}
    assert (found["merged"], found["zero_mapped_fault"]) == (30, 10)
    assert found["untouched"] >= 20
    assert "ksm_rmap_items" in ksmdist("whatif", tmp_path / "run", "--use-zero-pages").stdout


def test_what_cannot_be_captured(tmp_path: Path) -> None:
    for arguments, code, message in (
        (["--pid", "4194303"], 1, "process 4194303: does not exist"),
        ([], 2, "no process was named"),
        (["--comm", "no such comm"], 2, "no process that can be captured"),
        (["--cgroup", str(tmp_path)], 2, "is no cgroup"),
    ):
        done = ksmdist("capture", *arguments, "-o", tmp_path / "out")
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.kernel
def test_verify_kernel_prints_what_it_compared(ksm: Ksm) -> None:
    before = ksm.knobs()
    done = ksmdist("verify-kernel", "--layout", "00aabU.r", "--layout", "0:--a---U-", "--max-page-sharing", "2")
    assert done.returncode == 0, done.stderr
    assert "All 19 figures are as predicted." in done.stdout
    assert "ksm_process_profit" in done.stdout
    several = ksmdist("verify-kernel", "--random", "2", "--seed", "7", "--json")
    assert several.returncode == 0, several.stderr
    assert [one["equal"] for one in json.loads(several.stdout)] == [True, True]
    assert ksm.knobs() == before
    assert ksmdist("verify-kernel", "--layout", "a-").returncode == 2
    assert ksmdist("verify-kernel", "--layout", "a", "--random", "3").returncode == 2


@pytest.mark.kernel
def test_verify_kernel_of_running_processes(ksm: Ksm, start: Start) -> None:
    target = start('m = anon("m", 60, 15, 12)\nwrite(m, 0, 7, 20); write(m, 20, 0, 10); touch(m, 30, 40)')
    with ksm.restored():
        ksm.unmerge()
        ksm.scan(4)
        before = ksm.knobs()
        done = ksmdist("verify-kernel", "--live", str(target.pid))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "All 5 figures are as predicted." in done.stdout
        assert ksm.knobs() == before
        ksm.unmerge()


def test_interrupted_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, ksmdist.stages as s, ksmdist.cli as c\n"
        "def stop(*a): raise KeyboardInterrupt\n"
        "s.digests.digest_pages = stop\n"
        "sys.argv = ['ksmdist', 'run', 'a.raw', '-o', 'out']\n"
        "c.main()\n"
    )
    (tmp_path / "a.raw").write_bytes(ZERO)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.raw"]


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_on_a_terminals_stderr_alone(make_raw: MakeImage, tmp_path: Path, quiet: bool) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "ksmdist", "run", str(make_raw("a.raw", [ZERO, page(1)])), "-o", "out", "--json"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(
        command + ["--quiet"] * quiet, stdout=subprocess.PIPE, stderr=terminal, cwd=tmp_path, env=environment
    ) as process:
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # EIO: the program has closed its end
            while piece := os.read(controller, 1 << 16):
                shown += piece
        out = process.communicate(timeout=60)[0]
    os.close(controller)
    assert process.returncode == 0
    assert json.loads(out)["pages"]["total"] == 2
    if quiet:
        assert shown == b""
    else:
        for said in (b"engine: inline", b"scanning", b"2/2 pages", b"GiB/s", b"merging", b"1/1 ranges"):
            assert said in shown, shown
