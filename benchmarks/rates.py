"""Seconds a GiB of inline and of Ray's workers, start-up apart; where Ray begins to win; xxhsum's rate.

A rate is the slope between two sizes of input, so that imports and the start of Ray are not in it.
The larger inputs are hard links to the same four images: all of it stays in the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from images import linked, make_images, warm

BIN = Path(sys.executable).parent
QUIET: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
PORT = 6399
ROUNDS = 5
INLINE = "inline, 1 CPU"
SMALL, LARGE = 1, 8  # times 2 GiB


def run(paths: list[Path], out: Path, *options: str, cpus: set[int] | None = None) -> tuple[float, dict[str, float]]:
    """Whole-process seconds, and the run's own timings; cpus: on these alone."""
    shutil.rmtree(out, ignore_errors=True)
    ksmdist = str(BIN / "ksmdist")
    on: Any = {} if cpus is None else {"preexec_fn": lambda: os.sched_setaffinity(0, cpus)}
    began = time.perf_counter()
    subprocess.run([ksmdist, "run", *map(str, paths), "-o", str(out), "--json", "--quiet", *options], **QUIET, **on)
    return time.perf_counter() - began, json.loads((out / "run.json").read_text())["timings"]


def main(scratch: Path) -> None:
    paths = make_images(scratch / "images")
    small, large = linked(paths, SMALL, scratch / "links"), linked(paths, LARGE, scratch / "links")
    gib = (LARGE - SMALL) * sum(path.stat().st_size for path in paths) / (1 << 30)
    tiny = make_images(scratch / "tiny", count=1, pages=1 << 12)
    cpus = len(os.sched_getaffinity(0))
    workers = {INLINE: 1, "ray, 1 worker": 1, f"ray, {cpus} workers": cpus}
    out = scratch / "run"
    warm(paths)
    whole: dict[str, list[float]] = {name: [] for name in workers}
    scan: dict[str, list[float]] = {name: [] for name in workers}
    start: list[float] = []
    hashed: list[float] = []
    for number in range(ROUNDS + 1):
        for name, count in workers.items():
            options, on = ["--engine", "inline"], {min(os.sched_getaffinity(0))}
            if name != INLINE:
                ray = [str(BIN / "ray"), "start", "--head", f"--num-cpus={count}", "--include-dashboard=false"]
                subprocess.run([*ray, f"--port={PORT}"], **QUIET)
                options, on = ["--address", f"127.0.0.1:{PORT}"], os.sched_getaffinity(0)
                run(small, out, *options, cpus=on)  # the workers' start
            less, less_timings = run(small, out, *options, cpus=on)
            more, more_timings = run(large, out, *options, cpus=on)
            if name != INLINE:
                subprocess.run([str(BIN / "ray"), "stop"], **QUIET)
            if number:
                whole[name].append((more - less) / gib * count)
                scan[name].append((more_timings["scan_s"] - less_timings["scan_s"]) / gib * count)
        with_ray, _ = run(tiny, out, "--engine", "ray")
        without, _ = run(tiny, out, "--engine", "inline")
        began = time.perf_counter()
        if shutil.which("xxhsum"):
            subprocess.run(["xxhsum", "-H2", *map(str, paths)], **QUIET)
        if number:
            start.append(with_ray - without)
            hashed.append((time.perf_counter() - began) / (gib / (LARGE - SMALL)))
    one_core = {name: statistics.median(taken) for name, taken in whole.items()}
    scanning = {name: statistics.median(taken) for name, taken in scan.items()}
    ray_start = statistics.median(start)
    print(f"| seconds a GiB and worker, median of {ROUNDS} | scan | times inline | whole | times inline |")
    print("|---|---|---|---|---|")
    for name in workers:
        one, all = scanning[name], one_core[name]
        times = one / scanning[INLINE], all / one_core[INLINE]
        print(f"| {name} | {one:.3f} | {times[0]:.2f} | {all:.3f} | {times[1]:.2f} |")
    if shutil.which("xxhsum"):
        one_pass = statistics.median(hashed)
        print(f"\nxxhsum -H2: {one_pass:.3f} s a GiB; scanning goes at {one_pass / scanning[INLINE]:.2f} of its speed")
    else:
        print("\nnot measured, not installed: xxhsum")
    print(f"\nstarting and stopping Ray: {ray_start:.1f} s. It wins from:\n\n| CPUs | GiB |\n|---|---|")
    for count in (2, 4, 8, 16, 64):
        print(f"| {count} | {ray_start / (one_core[INLINE] * (1 - 1 / count)):.0f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
