"""The Ray engine: Ray Core tasks, on this machine or a running cluster. The only import of Ray.

Ray Data's group-by was measured ten times slower than tasks that merge sorted arrays.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.exceptions import AuthenticationError, OwnerDiedError, RayError, RayTaskError
from ray.util.metrics import Counter, Histogram
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ksmdist.engines.base import Machines, Result, Stage, Task
from ksmdist.errors import EngineError, KsmdistError
from ksmdist.signals import leave_no_core
from ksmdist.version import __version__

__all__ = ["HOST_LABEL", "Answer", "RayEngine", "knock", "knocked"]

HOST_LABEL = "ksmdist-host"
"""Ray node label with the name that `node://NAME/path` and a manifest's `host` mean; without it, the host's name."""

_TASKS_A_SLOT = 4  # in flight: enough that no worker waits for the driver, few enough to bound memory
_RETRIES = 10  # of a task whose worker or node died
_NODE_PATIENCE_S = 30.0  # for a node that has images to come back
_WORKERS_PATIENCE_S = 900.0  # for an autoscaler to start the first node that computes
_KNOCK_S = 5.0
_HEAD = "node:__internal_head__"  # a resource that Ray gives the head alone
_LOOK_S = 2.0  # between looks at a cluster that may have grown
_OBJECT_STORE_BYTES = 128 << 20  # of a Ray started here: what tasks find goes through files
_MOST_ABOVE = 28  # letters of the directory that Ray's is made in: a socket has 107, Ray's own names take 64
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


@functools.cache
def _keep_freed_memory() -> None:
    """Let this worker's malloc keep up to 256 MiB for the next task, where the C library is glibc.

    Its results gone to the object store, a worker would give the rest back after every task and
    fault it in again: combining a GiB's rows took 35 ms so, and takes 21.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)


@functools.cache
def _no_core() -> None:
    """leave_no_core(), once in a worker: it has the limits of its raylet, which may be anybody's."""
    leave_no_core()


def _work(stage: Stage[Any, Any], task: Any) -> Any:
    """Run one task in a worker, and count it for Ray's metrics."""
    _keep_freed_memory()
    _no_core()
    began = time.perf_counter()
    result = stage.function(task)
    tags = {"stage": stage.name}
    _seconds().observe(time.perf_counter() - began, tags)
    for name, amount in stage.figures(result).items():
        if amount > 0:
            _counter(name).inc(amount, tags)
    return result


# One for all stages: Ray keeps every remote function, in the driver, its workers and the GCS, until the driver leaves.
_WORK: Any = ray.remote(_work)


@functools.cache
def _seconds() -> Histogram:
    return Histogram(
        "ksmdist_task_seconds", "Time that tasks took.", [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300], ("stage",)
    )


@functools.cache
def _counter(name: str) -> Counter:
    return Counter(f"ksmdist_{name}", f"Number of {name} that tasks have dealt with.", ("stage",))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node said when it was asked something. result: None where it said nothing, and why.

    name: as node:// has it; asked, answered: seconds since the epoch, by the driver's clock
    """

    name: str
    address: str
    head: bool
    result: Any
    why: str
    asked: float
    answered: float


class RayEngine:
    """Tasks on Ray: a cluster at `address`, or one started here with a process for each CPU.

    A task whose worker or node dies is run again: on any node, or where its images are, once that is back.
    A process that has called ray.init() itself stays in that cluster, and leaves it itself: for run after run in one
    process, since Ray 2.60 keeps a thread and sockets each time that a driver leaves (benchmarks/soak.py).
    Of a Ray started here, logs, sockets and what it spills are in a directory of 0700, gone after close(): Ray's own
    choice, /tmp/ray, it makes 0777.
    Raises EngineError where Ray cannot be reached or started.
    """

    name = "ray"

    def __init__(self, address: str | None = None, cpus: int | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray's default is for ever: a task that is too large for its node would never end.
        os.environ.setdefault("RAY_task_oom_retries", str(_RETRIES))
        local: dict[str, Any] = (
            {}
            if address
            else {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        )
        self._leave = not ray.is_initialized()
        self._directory = ""
        if not self._leave:
            joined = ray.get_runtime_context().gcs_address
            if address not in (None, "auto", joined):
                raise EngineError(
                    "cannot be joined", address or "", f"leave {joined} first, where this process is, by ray.shutdown()"
                )
            return
        try:
            if not address:
                self._directory = _own_directory()
                local["_temp_dir"] = f"{self._directory}/r"  # one in it: Ray opens its own to all (0777)
            ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **local)
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
            self.close()
            raise EngineError(
                f"Ray cannot be reached or started: {(str(error) or type(error).__name__).splitlines()[0]}",
                address or "local",
                "check the address, that its Ray has this version, and that RAY_AUTH_MODE and the token are the "
                "cluster's, or use --engine inline",
            ) from None

    def machines(self) -> Machines:
        """See Engine.machines."""
        nodes = _alive()
        sizes = [_size(node) for node in nodes]
        working = [(cpus, memory) for cpus, memory in sizes if cpus >= 1]
        if not working:  # a head that computes nothing, before its workers come
            return Machines(frozenset(_names(nodes)), 1, 1 << 30)
        return Machines(
            frozenset(_names(nodes)), sum(cpus for cpus, _ in working), min(memory // cpus for cpus, memory in working)
        )

    def run(self, stage: Stage[Task, Result], tasks: Sequence[Task], on_done: Callable[[int, Result], None]) -> None:
        """See Engine.run. Many more tasks than the cluster has slots are never handed to Ray at once."""
        try:
            _Flight(stage, tasks).run(on_done)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, KsmdistError):
                raise cause from None
            if isinstance(cause, RayError) or "No module named 'ksmdist" in str(error):
                raise _lost(error if cause is None else cause, stage.name) from None
            raise
        except RayError as error:
            raise _lost(error, stage.name) from None

    @property
    def address(self) -> str:
        """Where the cluster's GCS is, host:port."""
        return str(ray.get_runtime_context().gcs_address)

    @property
    def dashboard(self) -> str:
        """Where the dashboard is, host:port; "" for none."""
        joined: Any = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
        return str(joined.address_info["webui_url"] or "")

    def ask(self, question: Callable[[str], Any], patience_s: float = 60.0) -> list[Answer]:
        """Have every node answer once, whatever CPUs it gives out; in order of their names.

        question: picklable; handed the node's directory of Ray's sessions.
        """
        asking = ray.remote(num_cpus=0, max_retries=0)(_answer)
        asked = time.time()
        nodes = _alive()
        where = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        refs = [asking.options(scheduling_strategy=strategy).remote(question) for strategy in where]
        waiting, answered = list(refs), dict[Any, float]()
        while waiting and (left := asked + patience_s - time.time()) > 0:
            ready, waiting = ray.wait(waiting, timeout=left)
            answered |= dict.fromkeys(ready, time.time())
        answers = []
        for node, ref in zip(nodes, refs, strict=True):
            result, why = None, ""
            try:
                result = ray.get(ref, timeout=0)
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                why = (str(cause) or type(cause).__name__).splitlines()[0]
                if ref in waiting:
                    ray.cancel(ref, force=True)
                    why = f"no answer in {patience_s:.0f} s"
            name = node.get("Labels", {}).get(HOST_LABEL) or node["NodeManagerHostname"]
            head = _HEAD in node["Resources"]
            at = answered.get(ref, time.time())
            answers.append(Answer(name, node["NodeManagerAddress"], head, result, why, asked, at))
        return sorted(answers, key=lambda answer: (answer.name, answer.address))

    def close(self) -> None:
        """Leave the cluster, or stop the one started here: Ray then ends what still runs of this driver's tasks."""
        if self._leave:
            ray.shutdown()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)


def _own_directory() -> str:
    """A directory, 0700, for a Ray that is started here: in RAY_TMPDIR or TMPDIR, or in /tmp where that is too long."""
    above = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    above = os.path.abspath(above)
    return tempfile.mkdtemp(prefix="ray-", dir=above if len(os.fsencode(above)) <= _MOST_ABOVE else "/tmp")


def _answer(question: Callable[[str], Any]) -> Any:
    return question(ray.get_runtime_context().get_temp_dir())


def knock(address: str) -> tuple[bool | None, str]:
    """Whether the GCS at host:port refuses a driver that has no token, and what came of it; None: that is not known.

    In a process of its own, since Ray reads its mode once.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _KNOCK_S).close()
    except (OSError, ValueError) as error:
        return None, f"{address}: {error}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    code = f"from ksmdist.engines.ray import knocked; print(knocked({address!r}))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=10 * _KNOCK_S,
            env=environment | {"RAY_AUTH_MODE": "disabled"},
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer in {10 * _KNOCK_S:.0f} s"
    said = done.stdout.strip().splitlines()[-1:] or done.stderr.strip().splitlines()[-1:] or ["nothing"]
    return {"refused": True, "let in": False}.get(said[0]), said[0]


def knocked(address: str) -> str:
    """Ask the GCS at host:port for its nodes, as a driver does first: `let in`, `refused` or what went wrong.

    Not by ray.init(): refused, that tries for 20 s and does not say why.
    """
    try:
        GcsClient(address=address).get_all_node_info(timeout=_KNOCK_S)
    except AuthenticationError:
        return "refused"
    except RayError as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return "let in"


def _lost(error: BaseException, stage: str) -> EngineError:
    hint = "see that the cluster is well, or use --engine inline"
    if isinstance(error, OwnerDiedError):  # what a worker says whose calls the driver refuses, too
        mode = os.environ.get("RAY_AUTH_MODE", "unset")
        hint = f"see that RAY_AUTH_MODE, {mode} here, is the cluster's, and that its nodes reach the driver"
    if "No module named 'ksmdist" in str(error):
        hint = f"install ksmdist {__version__} on every node"
    said = (str(error) or type(error).__name__).splitlines()[0]
    return EngineError(f"Ray lost the work: {type(error).__name__}: {said}", f"stage {stage}", hint)


class _Flight:
    """The tasks of a stage that Ray has: which, and how often they were lost."""

    def __init__(self, stage: Stage[Any, Any], tasks: Sequence[Any]) -> None:
        self._stage = stage
        self._tasks = tasks
        self._options: dict[str, Any] = {"max_retries": _RETRIES, "num_cpus": 1}
        if stage.memory:
            self._options["memory"] = stage.memory
        self._shared = ray.put(stage)
        self._running: dict[Any, int] = {}
        self._lost: dict[int, int] = {}
        self._looked = -_LOOK_S
        self._worked = time.monotonic()
        self._warned = False
        self._most = 2

    def run(self, on_done: Callable[[int, Any], None]) -> None:
        """All tasks, to the end."""
        started = 0
        while self._running or started < len(self._tasks):
            self._look()
            while started < len(self._tasks) and len(self._running) < self._most:
                self._start(started)
                started += 1
            some, _ = ray.wait(list(self._running), num_returns=1, timeout=_LOOK_S)
            if some:  # and all others that are ready
                some, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            for ref in some:
                number = self._running.pop(ref)
                try:
                    result = ray.get(ref)
                except RayTaskError:
                    raise
                except RayError as error:
                    self._again(number, error)
                else:
                    on_done(number, result)

    def _look(self) -> None:
        """How many tasks the cluster can have now."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        memory, slots, largest = self._stage.memory, 0, 0
        for cpus, available in map(_size, _alive()):
            if cpus >= 1:
                self._worked = self._looked
                slots += min(cpus, available // memory) if memory else cpus
                largest = max(largest, available)
        if largest == 0 and not self._warned:
            self._warned = True
            logging.getLogger("ksmdist").warning("ksmdist: the cluster has no node with a CPU: waiting for one")
        if self._looked - self._worked > _WORKERS_PATIENCE_S:
            raise EngineError(
                f"has had no node with a CPU for {_WORKERS_PATIENCE_S / 60:.0f} minutes",
                "the cluster",
                "add nodes that compute, or see why the autoscaler starts none",
            )
        if memory > largest > 0:
            raise EngineError(
                f"has no node with the {memory >> 20} MiB that a {self._stage.name} task may take: the largest gives "
                f"{largest >> 20} MiB",
                "the cluster",
                "add larger nodes, or set a smaller task_memory"
                + (" and shard_pages" if self._stage.name == "scan" else ""),
            )
        self._most = max(2, slots * _TASKS_A_SLOT)

    def _start(self, number: int) -> None:
        task = self._tasks[number]
        options = self._options | {"name": self._stage.describe(task)}
        node = self._stage.node(task)
        if node:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self._node_id(node), soft=False)
        self._running[_WORK.options(**options).remote(self._shared, task)] = number

    def _node_id(self, name: str) -> str:
        until = time.monotonic() + _NODE_PATIENCE_S
        while name not in (there := _names(nodes := _alive())):
            if time.monotonic() > until:
                raise EngineError("has left the cluster, and images are on it alone", f"node {name}", "bring it back")
            time.sleep(0.5)
        cpus, memory = next(_size(node) for node in nodes if node["NodeID"] == there[name])
        if cpus < 1 or memory < self._stage.memory:
            raise EngineError(
                f"gives Ray {cpus} CPUs and {memory >> 20} MiB, and a {self._stage.name} task of its images takes "
                f"1 and {self._stage.memory >> 20} MiB",
                f"node {name}",
                "give it more (ray start --num-cpus --memory), or set a smaller task_memory and shard_pages",
            )
        return there[name]

    def _again(self, number: int, error: RayError) -> None:
        """Start a lost task that must run on one node again: Ray gives up as soon as that node is gone."""
        self._lost[number] = self._lost.get(number, 0) + 1
        if not self._stage.node(self._tasks[number]) or self._lost[number] > _RETRIES:
            raise error
        time.sleep(0.5)  # a node that has just died is still taken for alive
        self._start(number)


def _alive() -> list[Mapping[str, Any]]:
    nodes: list[Mapping[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def _size(node: Mapping[str, Any]) -> tuple[int, int]:
    """CPUs and bytes of memory that Ray gives out of a node."""
    return int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("memory", 0))


def _names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Node ids by the names that a node goes by: its label, then its host's name and address."""
    names: dict[str, str] = {}
    for key in ("NodeManagerAddress", "NodeManagerHostname"):
        names |= {node[key]: node["NodeID"] for node in nodes}
    labels = [(node.get("Labels", {}).get(HOST_LABEL), node["NodeID"]) for node in nodes]
    return names | {label: node_id for label, node_id in labels if label}
