"""2 GiB of raw images, warm: ksmdist beside what a user would run instead. `make bench` runs it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from images import make_images, warm
from processes import compare

ROUNDS = 5


def main(scratch: Path) -> None:
    paths = make_images(scratch / "images")
    names = [str(path) for path in paths]
    ksmdist = str(Path(sys.executable).parent / "ksmdist")
    work = scratch / "work"
    out, hashes = work / "run", work / "hashes.db"
    run = [ksmdist, "run", *names, "-o", str(out), "--json", "--quiet", "--engine"]
    duperemove = ["duperemove", "-q", "-b", "4k", "-A", "--io-threads=2", "--cpu-threads=2", f"--hashfile={hashes}"]
    fio = ["fio-dedupe", "-b", "4096", "-t", "2", "-B", "0", "-p", "0"]
    script = str(Path(__file__).with_name("duckdb_script.py"))
    commands = {
        "ksmdist --engine inline": [[*run, "inline"]],
        "ksmdist --engine ray": [[*run, "ray"]],
        "xxh3 in 2 processes + DuckDB": [[sys.executable, script, *names]],
        "duperemove": [[*duperemove, *names]],
        "fio-dedupe, a file at a time": [[*fio, name] for name in names],
        "xxhsum -H2 (one pass, 1 core)": [["xxhsum", "-H2", *names]],
    }
    for name, steps in list(commands.items()):
        if shutil.which(steps[0][0]) is None:
            print(f"not measured, not installed: {name}")
            del commands[name]

    def before() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()

    os.sync()  # duperemove passes over what is not on the disk yet
    warm(paths)
    measured = compare(commands, ROUNDS, before)
    inline = measured["ksmdist --engine inline"].seconds
    print(f"| 2 GiB, warm, median of {ROUNDS} | s | times inline | spread | largest process, MiB |")
    print("|---|---|---|---|---|")
    for name, one in measured.items():
        print(f"| {name} | {one.seconds:.2f} | {one.seconds / inline:.2f} | {one.spread:.0%} | {one.peak_mib:,.0f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
