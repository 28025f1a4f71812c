"""What formats cost: scanning one GiB as each, beside the same bytes as Arrow, beside the decompressor alone.

A rate is the slope between two sizes of input, hard links to one file, so that starts are not in it. In turn, as
medians; compare within one run.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from formats import make_formats
from images import warm
from rates import BIN, PORT, QUIET, run

ROUNDS = 5
STREAM_ROUNDS = 3  # xz takes its time
MAPPED = ("arrow", "raw", "elf", "lime", "mapped-ram")
KDUMP = ("kdump-zlib", "kdump-zlib-flattened")
STREAMS = {  # sized: its size is in it, and need not be counted
    "raw.gz": "gzip",
    "raw.zst": "zstd",
    "raw.sized.zst": "zstd",
    "raw.lz4": "lz4",
    "raw.sized.lz4": "lz4",
    "raw.xz": "xz",
}
LARGE = {**dict.fromkeys(MAPPED, 9), **dict.fromkeys((*KDUMP, *STREAMS), 3), "raw.xz": 2}  # links, beside one


def links(path: Path, times: int, directory: Path) -> list[Path]:
    """`times` names for a file."""
    directory.mkdir(parents=True, exist_ok=True)
    found = [directory / f"{number:02d}-{path.name}" for number in range(times)]
    for link in found:
        if not link.exists():
            link.hardlink_to(path)
    return found


def slope(path: Path, scratch: Path, *options: str, cpus: set[int]) -> tuple[float, float]:
    """Seconds that one image more takes: to scan, and as a whole process."""
    large = LARGE[path.name.removeprefix("guest.")]
    whole, scan = [], []
    for count in (1, large):
        taken, timings = run(links(path, count, scratch / "links"), scratch / "run", *options, cpus=cpus)
        whole.append(taken)
        scan.append(timings["scan_s"])
    return (scan[1] - scan[0]) / (large - 1), (whole[1] - whole[0]) / (large - 1)


def formats(files: dict[str, Path], scratch: Path) -> None:
    """Formats whose pages are where they are, on one CPU."""
    one = {min(os.sched_getaffinity(0))}
    names = [name for name in (*MAPPED, *KDUMP) if name in files]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(ROUNDS + 1):
        for name in names:
            measured = slope(files[name], scratch, "--engine", "inline", cpus=one)
            if number:
                taken[name].append(measured)
    gb = files["raw"].stat().st_size / 1e9
    middle = {name: [statistics.median(each) for each in zip(*taken[name], strict=True)] for name in names}
    print(f"| inline, 1 CPU, median of {ROUNDS} | scan, GB/s | of Arrow | whole, GB/s | of Arrow |")
    print("|---|---|---|---|---|")
    for name in names:
        scan, whole = middle[name]
        of = middle["arrow"][0] / scan, middle["arrow"][1] / whole
        print(f"| {name} | {gb / scan:.2f} | {of[0]:.2f} | {gb / whole:.2f} | {of[1]:.2f} |")


def workers(path: Path, scratch: Path) -> None:
    """A kdump by one worker and by one on each CPU."""
    cpus = os.sched_getaffinity(0)
    taken: dict[int, list[float]] = {1: [], len(cpus): []}
    for number in range(ROUNDS + 1):
        for count in taken:
            start = [str(BIN / "ray"), "start", "--head", f"--num-cpus={count}", "--include-dashboard=false"]
            subprocess.run([*start, f"--port={PORT}"], **QUIET)
            address = ["--address", f"127.0.0.1:{PORT}"]
            run(links(path, 1, scratch / "links"), scratch / "run", *address, cpus=cpus)  # the workers' start
            scan, _ = slope(path, scratch, *address, cpus=cpus)
            subprocess.run([str(BIN / "ray"), "stop"], **QUIET)
            if number:
                taken[count].append(scan)
    gb = path.with_name("guest.raw").stat().st_size / 1e9
    print(f"\n| {path.name.removeprefix('guest.')}, Ray, median of {ROUNDS} | scan, GB/s | times one worker |")
    print("|---|---|---|")
    for count, seconds in taken.items():
        middle = statistics.median(seconds)
        print(f"| {count} workers | {gb / middle:.2f} | {statistics.median(taken[1]) / middle:.2f} |")


def streams(files: dict[str, Path], scratch: Path) -> None:
    """Compressed files beside what unpacks them: whole processes, as many CPUs as there are."""
    cpus = os.sched_getaffinity(0)
    names = [name for name in STREAMS if name in files]
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for number in range(STREAM_ROUNDS + 1):
        for name in names:
            scan, whole = slope(files[name], scratch, "--engine", "inline", cpus=cpus)
            began = time.perf_counter()
            subprocess.run([STREAMS[name], "-dc", str(files[name])], **QUIET)
            alone = time.perf_counter() - began
            if number:
                taken[name].append((whole, scan, alone))
    gb = files["raw"].stat().st_size / 1e9
    rates = "scan, GB/s | whole, GB/s | alone, GB/s | scan of alone | whole of alone"
    print(f"\n| inline, median of {STREAM_ROUNDS} | {rates} |")
    print("|---|---|---|---|---|---|")
    for name in names:
        whole, scan, alone = (statistics.median(each) for each in zip(*taken[name], strict=True))
        of = f"{alone / scan:.2f} | {alone / whole:.2f}"
        print(f"| {name} | {gb / scan:.2f} | {gb / whole:.2f} | {gb / alone:.2f} | {of} |")


def main(scratch: Path) -> None:
    files = make_formats(scratch / "formats")
    warm(list(files.values()))
    formats(files, scratch)
    workers(files["kdump-zlib"], scratch)
    streams(files, scratch)
    shutil.rmtree(scratch / "run", ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
