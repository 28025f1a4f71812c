"""What --verify costs: whole runs with hash and with bytes beside runs with none, paired, of CPU time and of the clock.

    python benchmarks/confirming.py SCRATCH [IMAGE ...]      without images: four made ones, 2 GiB

Every round runs all three in an order that turns; a figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from images import make_images, warm

MODES = ("none", "hash", "bytes")
ROUNDS = 9


def run(images: list[Path], out: Path, verify: str) -> tuple[float, float]:
    """Seconds of the clock, and of all CPUs, of one run on one engine of this process."""
    shutil.rmtree(out, ignore_errors=True)
    before = os.times()
    began = time.perf_counter()
    command = [str(Path(sys.executable).parent / "ksmdist"), "run", *map(str, images), "-o", str(out), "--json"]
    command += ["--quiet", "--no-key", "--engine", "inline", "--verify", verify]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    took = time.perf_counter() - began
    after = os.times()
    return took, after.children_user + after.children_system - before.children_user - before.children_system


def main(scratch: Path, images: list[Path]) -> None:
    images = images or make_images(scratch / "images")
    warm(images)
    ratios: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    seconds: list[float] = []
    for number in range(ROUNDS + 1):
        taken = {}
        for at in range(len(MODES)):
            mode = MODES[(number + at) % len(MODES)]
            taken[mode] = run(images, scratch / "run", mode)
        if number:  # the first warms up
            seconds.append(taken["none"][0])
            for mode in MODES:
                ratios[mode].append((taken[mode][0] / taken["none"][0], taken[mode][1] / taken["none"][1]))
    names = ", ".join(path.name for path in images)
    print(f"{names}: none takes {statistics.median(seconds):.2f} s")
    for mode in MODES[1:]:
        clock, cpu = (sorted(pair[which] for pair in ratios[mode]) for which in (0, 1))
        print(
            f"  {mode}: clock {statistics.median(clock):.2f} ({clock[0]:.2f} to {clock[-1]:.2f}), "
            f"CPU {statistics.median(cpu):.2f} ({cpu[0]:.2f} to {cpu[-1]:.2f}) times none"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
