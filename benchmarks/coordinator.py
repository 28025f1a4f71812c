"""What one task costs the driver, with two, four and eight raylets: how far one coordinator goes.

Tasks that find one page each, so that nothing but handing out, the tasks' files and adding up is left. The
raylets share this machine's CPUs, so the tasks' own rate says nothing; the driver's CPU time a task does.

    python benchmarks/coordinator.py [TASKS]
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from ksmdist import classes, pipeline, plan, roster, stages
from ksmdist.digests import Digester
from ksmdist.images import ImageInfo
from ksmdist.scanned import Mapped, Opened, Scanned
from ksmdist.settings import Settings
from ksmdist.tables import CLASSES, KINDS
from ksmdist.timings import NoProgress

RAYLETS = (2, 4, 8)
TASKS = 4096
GIB_A_SHARD = (1, 4, 8)


def read(
    region_names: Sequence[str], settings: Settings, digester: Digester, scan: stages.Scan
) -> tuple[Mapped, pa.Table, list[pa.Table]]:
    """In the place of stages.read_shards: pages that are read-fault zero pages, which leave no rows."""
    number = scan.task.shards[0].image
    scanned = Scanned.nothing(scan.images[number].info, settings)
    scanned.classes[CLASSES.index("zero_mapped_fault")] += scan.task.pages
    scanned.kinds[KINDS.index("zero")] += 0
    scanned.colors[0, 1] += scan.task.pages
    return Mapped({number: scanned}, [], scan.task.pages), classes.combine([], settings.page_size), []


def drive(raylets: int, tasks: int) -> None:
    """One run in this process; prints the driver's CPU seconds of its scan."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(raylets):
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    info = ImageInfo("made-up", "raw", "guest", 4096, tasks, 0, 0, "", image_id="made-up")
    roster.look = lambda runner, sources, settings, strict: ([Opened("made-up", "", info)], [])
    stages.read_shards = read
    used: dict[str, float] = {}

    class Watch(NoProgress):
        def stage(self, line: str) -> None:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            used[line.split(":")[0]] = usage.ru_utime + usage.ru_stime

    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(shard_pages=1, ranges=1, task_memory=256 << 20)
        pipeline.run(["made-up"], Path(scratch) / "run", settings, "ray", cluster.address, Watch())
    print(used["scan"] - used["start"])
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]
    os._exit(0)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        drive(int(sys.argv[1]), int(sys.argv[2]))
    tasks = int(sys.argv[1]) if len(sys.argv) > 1 else TASKS
    print(
        "| raylets | driver, CPU ms a task |"
        + "".join(f" CPUs at which it is 5 % of the time, {gib} GiB a shard |" for gib in GIB_A_SHARD)
        + "\n"
        + "|---" * (2 + len(GIB_A_SHARD))
        + "|"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    for raylets in RAYLETS:
        command = [sys.executable, __file__, str(raylets), str(tasks)]
        child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        cost = float(child.stdout.split()[-1]) / tasks
        whole = plan.SCAN_S_PER_GIB + (1 << 18) * plan.MERGE_S_PER_ROW
        reach = "".join(f" {0.05 * gib * whole / cost:,.0f} |" for gib in GIB_A_SHARD)
        print(f"| {raylets} | {cost * 1000:.2f} |{reach}", flush=True)
