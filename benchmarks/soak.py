"""Run after run on a cluster of three raylets, while a worker or a raylet is killed every 20 s at random.

    PYTHONPATH=. RAY_AUTH_MODE=disabled python benchmarks/soak.py [--seconds 3600] [--every 20] [--seed 7] ...
    python benchmarks/soak.py --table build/soak/result.json       the figures in Markdown

One driver, a process that lives through all of it, runs the same images again and again. What must hold:

- every file of every run is, byte for byte, that of a first run made inline before anything is killed; but for
  metrics.prom, and what run.json says of engine, times and place. No run fails, and none leaves a file behind;
- a kill falls into a scan, and one into a merge;
- nothing that lives on grows: memory, open files and threads of the driver, of the head's GCS, raylet and agents;
  memory files, temporary files, processes. Grows: a line fitted to the samples after the first fifth of the time
  rises by more than a bound (growth.py).

The head computes nothing and is never killed. A raylet is killed with its workers, as when its host loses power, and
a new one takes its place. A line a minute; result.json and result.md at the end; exit code 1 where a promise was
broken.
All processes below this one are ended with it: it adopts what a killed raylet leaves (PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import hashlib
import json
import logging
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import growth
import images

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_BACK_S = 3.0  # until a killed raylet's place is taken
_RUN_LIMIT_S = 300.0  # of one run: Ray may wait 60 s to believe that a node is dead
_SAMPLE_S = 5.0
_LEAST_RUNS = 7  # even if the time is up: of fewer nothing can be said
_WARM = 0.2  # of the time: pools of memory and threads fill, malloc finds its level
_OBJECT_STORE_BYTES = 100 << 20
_NODE_MEMORY_BYTES = 2 << 30
_TASKS_REMEMBERED = 1000
_SOCKETS_OF_A_RAYLET = 0.5  # a driver without ksmdist had 8 more after 20 killed raylets
_FILES_OF_A_RAYLET = 8  # sockets and port files, which a killed raylet cannot take away
_NEXT = {
    "start": "open",
    "open": "scan",
    "scan": "confirm",
    "confirm": "merge",
    "merge": "relate",
    "relate": "count",
    "count": "end",
}
_OF_THIS_RUN = ("engine", "timings")
_OF_THIS_RUN_IN_SUMMARY = ("engine", "engine_why", "run")


def files_of(run: Path) -> dict[str, str]:
    """SHA-256 of every file of a run directory, but for what tells of engine, times and place."""
    found = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name == "metrics.prom":
            continue
        if path == run / "run.json":
            manifest = json.loads(data)
            for key in _OF_THIS_RUN:
                del manifest[key]
            for key in _OF_THIS_RUN_IN_SUMMARY:
                del manifest["summary"][key]
            data = json.dumps(manifest, sort_keys=True).encode()
        found[str(path.relative_to(run))] = hashlib.sha256(data).hexdigest()
    return found


def drive(options: argparse.Namespace) -> None:
    """The driver: runs until the time is up, each told in a line of JSON; not on stdout, where Ray talks too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    import ray

    from ksmdist import pipeline
    from ksmdist.errors import KsmdistError
    from ksmdist.settings import Settings
    from ksmdist.timings import NoProgress

    told = os.fdopen(options.tell, "w", encoding="utf-8")

    def tell(**what: Any) -> None:
        print(json.dumps(what), file=told, flush=True)

    class Watch(NoProgress):
        def stage(self, line: str) -> None:
            tell(stage=_NEXT.get(line.split(":")[0], "end"))

    if options.address and not options.rejoin:
        ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR)
    made = sorted(options.scratch.glob("links/*.raw"))
    runs = options.scratch / "runs"
    runs.mkdir()
    # All that would follow from memory and CPUs of the moment is set, since nodes come and go.
    settings = Settings(shard_pages=options.shard_pages, ranges=options.ranges, task_memory=512 << 20)
    pipeline.run(made, runs / "first", settings, "inline")
    first = files_of(runs / "first")
    shutil.rmtree(runs / "first")
    tell(first=len(first))
    end = time.monotonic() + options.seconds
    number = 0
    while time.monotonic() < end or number < _LEAST_RUNS:
        number += 1
        out = runs / f"{number:05d}"
        began = time.monotonic()
        tell(stage="start")
        error = ""
        try:
            pipeline.run(made, out, settings, "ray" if options.address else "inline", options.address, Watch())
        except KsmdistError as failed:
            error = str(failed)
        took = time.monotonic() - began
        now = files_of(out) if out.is_dir() else {}
        differ = sorted(name for name in first.keys() | now.keys() if first.get(name) != now.get(name))
        left = sorted(entry.name for entry in runs.iterdir() if entry != out)
        if (error or differ or left) and options.out:
            for entry in list(runs.iterdir()):  # kept to be looked at
                shutil.move(entry, options.out / f"broken-{number:05d}-{entry.name}")
        shutil.rmtree(out, ignore_errors=True)
        gc.collect()
        mine = growth.held(os.getpid())
        assert mine is not None
        tell(
            run=number,
            seconds=round(took, 2),
            error=error,
            differ=differ,
            left=left,
            rss=mine.rss,
            files=mine.files,
            sockets=mine.sockets,
            threads=mine.threads,
        )


class Driver:
    """The driver's process, and what it has told."""

    def __init__(self, options: argparse.Namespace, address: str, temporary: Path) -> None:
        command = [sys.executable, __file__, "--drive", "--address", address, "--scratch", str(options.scratch)]
        for name in ("out", "seconds", "shard_pages", "ranges"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--rejoin"] * options.rejoin
        environment = {**os.environ, "TMPDIR": str(temporary)}
        environment.pop("RAY_ADDRESS", None)
        self._log = options.out / "driver.log"
        read, write = os.pipe()
        command += ["--tell", str(write)]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, pass_fds=[write])
        os.close(write)
        self._told = os.fdopen(read, encoding="utf-8")
        self.stage = ""
        self.files = 0
        self.runs: list[dict[str, Any]] = []
        self.told_at = time.monotonic()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._told:
            told = json.loads(line)
            self.told_at = time.monotonic()
            self.stage = told.get("stage", self.stage)
            self.files = told.get("first", self.files)
            if "run" in told:
                self.stage = ""
                self.runs.append(told | {"at": self.told_at})

    def close(self) -> str:
        """End it, where it has not ended; the end of what it said on stderr."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        self._told.close()
        return str(self._log.read_text()[-2000:])


class Cluster:
    """A head that computes nothing and three raylets, which are killed and replaced."""

    def __init__(self, temporary: Path) -> None:
        from tests import clusters

        self._clusters = clusters
        self.temporary = temporary
        self._stack = contextlib.ExitStack()
        head = {
            "temp_dir": str(temporary),
            "object_store_memory": _OBJECT_STORE_BYTES,
            # What Ray keeps of tasks that are done, 100,000 of them unless told: its end is reached while warming up.
            "_system_config": {"task_events_max_num_task_in_gcs": _TASKS_REMEMBERED},
        }
        self._node = {"object_store_memory": _OBJECT_STORE_BYTES, "memory": _NODE_MEMORY_BYTES}
        self.address, self._cluster, self._nodes = self._stack.enter_context(
            clusters.raylets(["one", "two", "three"], 1, head, **self._node)
        )
        self.logs = temporary / "session_latest" / "logs"
        self._gone: list[tuple[float, str]] = []
        self.restarted = 0
        processes = self._cluster.head_node.all_processes
        self.head = {kind: found[0].process.pid for kind, found in processes.items() if found}
        for pid, doing in clusters.workers(self._cluster.head_node).items():
            if "Agent" in doing:
                self.head[doing.split()[0].removeprefix("ray::")] = pid

    def kill(self, kind: str, aim: str, rng: random.Random) -> tuple[str, str, str] | None:
        """SIGKILL a worker, or a raylet with its workers: kind, node, and what they were at; None where none is at it.

        aim: scan, merge, or "" for whatever they are at.
        """
        found = {}
        for name, node in self._nodes.items():
            found[name] = {
                pid: doing
                for pid, doing in self._clusters.workers(node).items()
                if doing.startswith("ray::") and "Agent" not in doing  # without its agents a raylet ends
            }
        at = [
            (name, pid, doing.removeprefix("ray::").split()[0].strip().lower())
            for name, workers in found.items()
            for pid, doing in workers.items()
        ]
        fitting = [one for one in at if one[2] == aim] if aim else at
        if not fitting:
            return None
        name, pid, doing = rng.choice(sorted(fitting))
        if kind == "raylet" and len(self._nodes) > 1:
            self._clusters.kill(self._nodes[name])
            self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)
            self._gone.append((time.monotonic() + _BACK_S, name))
            return "raylet", name, doing
        os.kill(pid, signal.SIGKILL)
        return "worker", name, doing

    def tend(self) -> None:
        """Put a raylet in the place of one that was killed, once its time has come; let go of what has ended."""
        if self._gone and time.monotonic() >= self._gone[0][0]:
            _, name = self._gone.pop(0)
            self._nodes[name] = self._clusters.add(self._cluster, name, 1, **self._node)
            self.restarted += 1
            end_on_signals()  # Ray has put a handler of its own

    def close(self) -> None:
        """Stop it."""
        self._stack.close()


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process as an exception does, so that all that it started ends."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))


def reap(mine: set[int]) -> None:
    """Wait for adopted processes that have ended; `mine` are waited for by those who started them."""
    for pid, state in growth.descendants(os.getpid()).items():
        if state == "Z" and pid not in mine:
            with contextlib.suppress(OSError):
                os.waitpid(pid, os.WNOHANG)


def end_all() -> int:
    """SIGKILL every process below this one, and wait for them; how many there were."""
    ended = 0
    for _ in range(50):
        below = growth.descendants(os.getpid())
        for pid, state in below.items():
            if state != "Z":
                ended += 1
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        for pid in below:
            with contextlib.suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
        if not below:
            break
        time.sleep(0.1)
    return ended


class Watch:
    """Samples of all that must not grow."""

    def __init__(self, bounds: dict[str, float]) -> None:
        self.series: dict[str, growth.Series] = {}
        self._bounds = bounds

    def add(self, second: float, name: str, unit: str, amount: float) -> None:
        """A sample; the bound is the name's, or the unit's."""
        key = f"{name}, {unit}"
        bound = self._bounds.get(key, self._bounds.get(unit, 0.0))
        self.series.setdefault(key, growth.Series(name, unit, bound)).add(second, amount)

    def sample(self, second: float, cluster: Cluster, driver: Driver, temporary: Path) -> None:
        """What all but the driver hold."""
        for name, pid in cluster.head.items():
            mine = growth.held(pid)
            if mine is None:
                raise RuntimeError(f"the head's {name} has died")
            self.add(second, f"head's {name}", "MiB", mine.rss - mine.shared)
            self.add(second, f"head's {name}", "open files", mine.files)
            self.add(second, f"head's {name}", "sockets", mine.sockets)
            self.add(second, f"head's {name}", "threads", mine.threads)
            if name == "raylet":
                self.add(second, "head's object store", "MiB", mine.shared)
        below = growth.descendants(os.getpid())
        self.add(second, "all processes", "processes", len(below))
        self.add(second, "all processes", "MiB", sum(found.rss for pid in below if (found := growth.held(pid))))
        shm = os.statvfs("/dev/shm")
        self.add(second, "/dev/shm", "MiB", (shm.f_blocks - shm.f_bfree) * shm.f_frsize / growth.MIB)
        self.add(second, "/dev/shm", "files", len(os.listdir("/dev/shm")))
        self.add(second, "driver's temporary directory", "files", growth.folder_size(temporary)[0])
        logs, size = growth.folder_size(cluster.logs)
        self.add(second, "Ray's logs", "MiB", size)
        files = growth.folder_size(cluster.temporary)[0] - logs
        self.add(second, "Ray's temporary directory, without logs", "files", files)


MUST_FALL = ("scan", "merge")
GCS_MIB = "head's gcs_server, MiB"
# By unit, or by series.
BOUNDS = {
    "MiB": 32.0,
    "open files": 4.0,
    "sockets": 8.0,
    "threads": 8.0,
    "files": 4.0,
    "processes": 8.0,
    "all processes, MiB": 500.0,  # of some 2,300: two workers more or less, as they come and go
    "head's log_monitor, open files": 200.0,  # the most it opens (Ray's LOG_MONITOR_MAX_OPEN_FILES)
    "Ray's logs, MiB": 512.0,  # three files of each worker that is started, which Ray keeps while the cluster lives
}


def soak(options: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Any]:
    """All of it; what came out."""
    rng = random.Random(options.seed)
    print(f"seed {options.seed}: {options.seconds:.0f} s, a kill every {options.every:.0f} s", flush=True)
    links = [options.scratch / "images", options.scratch / "links"]
    made = images.make_images(links[0], options.images, options.pages)
    names = images.linked(made, options.links, links[1])
    temporary = options.scratch / "tmp"
    temporary.mkdir()
    ray_folder = Path(tempfile.mkdtemp(prefix="kd"))  # short: the paths of sockets have 107 bytes
    stack.callback(shutil.rmtree, ray_folder, ignore_errors=True)
    stack.callback(end_all)
    cluster = Cluster(ray_folder)
    end_on_signals()
    stack.callback(cluster.close)
    driver = Driver(options, cluster.address, temporary)
    stack.callback(driver.close)
    while not driver.files and driver.process.poll() is None:
        time.sleep(0.1)
    if not driver.files:
        raise SystemExit(f"the first run, inline and unharmed, failed: {driver.close()}")
    began = time.monotonic()
    watch = Watch(BOUNDS)
    kills: list[dict[str, Any]] = []
    broken: list[str] = []
    planned = iter(_planned(rng, options))
    due = next(planned, None)
    sampled = minute = -1e9
    noted = 0
    while driver.process.poll() is None:
        now = time.monotonic()
        second = now - began
        if now - driver.told_at > _RUN_LIMIT_S:
            broken.append(f"run {len(driver.runs) + 1} has told nothing for {_RUN_LIMIT_S:.0f} s in {driver.stage}")
            break
        if due and second >= due[0] and driver.stage:
            at, kind, aim = due
            late = second - at > options.every / 2 and len(kills) >= len(MUST_FALL)
            if late or not aim or driver.stage == aim:
                done = cluster.kill(kind, "" if late else aim, rng)
                if done or late:
                    due = next(planned, None)
                if done:
                    kills.append(dict(zip(("kind", "node", "at"), done, strict=True)) | {"stage": driver.stage})
                    kills[-1]["second"] = round(second, 1)
        cluster.tend()
        for run in driver.runs[noted:]:
            for name in ("rss", "files", "sockets", "threads"):
                unit = {"rss": "MiB", "files": "open files"}.get(name, name)
                watch.add(run["at"] - began, "driver", unit, run[name])
            for what in ("error", "differ", "left"):
                if run[what]:
                    broken.append(f"run {run['run']}: {what}: {run[what]}")
        noted = len(driver.runs)
        if now - sampled >= _SAMPLE_S:
            sampled = now
            reap({driver.process.pid, *cluster.head.values()})
            watch.sample(second, cluster, driver, temporary)
        if now - minute >= 60:
            minute = now
            _say(second, driver, kills, cluster, watch, broken)
        time.sleep(0.005)
    said = driver.close()
    if driver.process.returncode:
        broken.append(f"the driver ended with {driver.process.returncode}: {said}")
    for stage in MUST_FALL:
        if not any(kill["at"] == stage for kill in kills):
            broken.append(f"no kill fell into a {stage}")
    window = options.seconds * _WARM
    raylets = sum(kill["kind"] == "raylet" for kill in kills)
    watch.series["Ray's temporary directory, without logs, files"].bound += _FILES_OF_A_RAYLET * raylets
    for name in ("driver", "head's gcs_server", "head's raylet"):
        if f"{name}, sockets" in watch.series:  # a driver that ended before its first run has none
            watch.series[f"{name}, sockets"].bound += _SOCKETS_OF_A_RAYLET * raylets
    grown = [series.growth(window) for series in watch.series.values()]
    broken += [f"grows: {one['name']}, {one['unit']}: {one['rise']}" for one in grown if one["held"] is False]
    broken += [f"unknown whether it grows: {one['name']}, {one['unit']}" for one in grown if one["held"] is None]
    times = [run["seconds"] for run in driver.runs]
    return {
        "broken": broken,
        "seconds": round(time.monotonic() - began),
        "seed": options.seed,
        "every_s": options.every,
        "input_gib": round(len(names) * options.pages * images.PAGE_BYTES / (1 << 30), 2),
        "images": len(names),
        "files_compared": driver.files,
        "runs": len(driver.runs),
        "runs_alike": sum(not (run["error"] or run["differ"] or run["left"]) for run in driver.runs),
        "run_s": f"{statistics.median(times):.1f}, {max(times):.1f}" if times else "none",
        "kills": {
            kind: dict(collections.Counter(kill["at"] for kill in kills if kill["kind"] == kind))
            for kind in ("worker", "raylet")
        },
        "raylets_replaced": cluster.restarted,
        "growth": grown,
        "warm_s": window,
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
        "each_kill": kills,
        "series": {key: [one.seconds, one.amounts] for key, one in watch.series.items()},
    }


def _planned(rng: random.Random, options: argparse.Namespace) -> Iterator[tuple[float, str, str]]:
    """When a kill is due, of what, and what it is to be at: a moment in each `every` seconds, drawn anew.

    The first two are of what must be killed at least once, and wait for it; the others wait half of `every`.
    """
    for number in range(int(options.seconds / options.every)):
        at = (number + rng.random() / 2) * options.every
        kind, aim = rng.choice(("worker", "raylet")), rng.choice(("scan", "merge", ""))
        yield at, kind, MUST_FALL[number] if number < len(MUST_FALL) else aim


def _say(
    second: float, driver: Driver, kills: list[dict[str, Any]], cluster: Cluster, watch: Watch, broken: list[str]
) -> None:
    """A line of how it goes."""
    at = collections.Counter(f"{kill['kind']} at {kill['at']}" for kill in kills)
    last = {key: f"{series.amounts[-1]:.0f}" for key, series in watch.series.items()}
    figures = [
        f"{len(driver.runs)} runs",
        f"{len(kills)} kills ({', '.join(f'{what} {count}' for what, count in sorted(at.items()))})",
        f"{cluster.restarted} raylets replaced",
        f"driver {last.get('driver, MiB', '?')} MiB, {last.get('driver, open files', '?')} files, "
        f"{last.get('driver, sockets', '?')} sockets",
        f"GCS {last[GCS_MIB]} MiB",
        f"{last['all processes, processes']} processes",
        f"broken: {len(broken)}",
    ]
    print(f"{second / 60:5.1f} min: {'; '.join(figures)}", flush=True)


def markdown(result: dict[str, Any]) -> str:
    """The figures."""
    kills = result["kills"]
    kinds = sorted({at for of_kind in kills.values() for at in of_kind})
    lines = [
        f"{result['seconds']:,} s, seed {result['seed']}, a kill every {result['every_s']:.0f} s; each run "
        f"{result['images']} images, {result['input_gib']} GiB; {result['machine']['cpus']} CPUs, "
        f"kernel {result['machine']['kernel']}, Python {result['machine']['python']}.",
        "",
        "| | |",
        "|---|---|",
        f"| runs | {result['runs']:,} |",
        f"| of them byte for byte the first, {result['files_compared']} files each | {result['runs_alike']:,} |",
        f"| seconds a run, median and most | {result['run_s']} |",
        f"| raylets that took a killed one's place | {result['raylets_replaced']} |",
        "",
        "| killed while at | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for kind, of_kind in kills.items():
        lines.append(f"| {kind} | " + " | ".join(str(of_kind.get(at, 0)) for at in kinds) + " |")
    broken = [f"- BROKEN: {line}" for line in result["broken"]] or ["No promise was broken."]
    return "\n".join([*lines, "", growth.table(result["growth"]), *broken]) + "\n"


def main() -> int:
    """Soak, or one of its parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--every", type=float, default=20)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--images", type=int, default=4, help="different ones")
    parser.add_argument("--pages", type=int, default=1 << 15, help="of each")
    parser.add_argument("--links", type=int, default=96, help="names of each: how often it is scanned")
    parser.add_argument("--shard-pages", type=int, default=1 << 16)
    parser.add_argument("--ranges", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    parser.add_argument("--rejoin", action="store_true", help="leave and join the cluster for every run")
    parser.add_argument("--table", type=Path, help="print a result.json in Markdown")
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tell", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(markdown(json.loads(options.table.read_text())), end="")
        return 0
    if options.drive:
        drive(options)
        return 0
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with contextlib.ExitStack() as stack:
        options.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.out)))
        result = soak(options, stack)
    if left := growth.descendants(os.getpid()):
        result["broken"].append(f"{len(left)} processes are left")
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "result.md").write_text(markdown(result))
    print(markdown(result), flush=True)
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
