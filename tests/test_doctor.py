"""Each check of doctor both ways, from facts; the facts of this host; clusters with and without a token."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

import ksmdist
from ksmdist import clusters as looked_at
from ksmdist import doctor, hosts
from ksmdist.doctor import Cluster, Dashboard, Directory, Finding, Host, Listening, Node, Swap
from ksmdist.engines.ray import RayEngine
from ksmdist.settings import Settings

from . import clusters, faults
from .conftest import invoke

HOST = Host(
    name="vm",
    user=1000,
    capabilities=0,
    core_limit=0,
    core_pattern="core",
    swaps=(),
    umask=0o077,
    ptrace_scope=1,
    temporary=Directory("/tmp", 0o1777),
    ray_temporary=Directory("/tmp/ray", 0o777, guarded=True),
    key_file=("/home/a/.config/ksmdist/key", ""),
    secrets=(),
    ksm={"run": "0"},
    pagemap_scan=True,
    packages=(("ray", "2.60.0", "==2.60.0"), ("typer", "0.28.1", "<0.29,>=0.16")),
    versions={"python": "3.11.7", "ray": "2.60.0"},
    listening=(Listening("0.0.0.0", 6379, "GCS"),),
)
NODE = Node("blue", "198.51.100.1", HOST, skew_s=(-0.1, 0.2), head=True)
CLUSTER = Cluster("198.51.100.1:6379", True, "refused", "token", False, Dashboard("", None), (NODE,))


def found(findings: list[Finding], name: str, where: str | None = None) -> Finding:
    (one,) = [one for one in findings if one.name == name and where in (None, one.where)]
    return one


@pytest.mark.parametrize(
    ("check", "facts", "state", "said"),
    [
        ("core dumps", {}, "ok", "RLIMIT_CORE is 0"),
        ("core dumps", {"core_limit": 1}, "ok", "RLIMIT_CORE is 1"),
        ("core dumps", {"core_limit": -1}, "unsafe", "a crash writes memory to core"),
        ("core dumps", {"core_pattern": "|/usr/lib/systemd/systemd-coredump %P"}, "unsafe", "systemd-coredump"),
        ("core dumps", {"core_pattern": "|/x", "core_limit": 1}, "ok", "keeps dumps from it"),
        ("core dumps", {"core_pattern": None}, "unknown", "could not be read"),
        ("swap", {}, "ok", "none"),
        ("swap", {"swaps": (Swap("/dev/zram0", "memory"), Swap("/dev/dm-1", "encrypted"))}, "ok", "zram0 (memory)"),
        ("swap", {"swaps": (Swap("/dev/sda2", "plain"), Swap("/swap", "unknown"))}, "unsafe", "/dev/sda2"),
        ("swap", {"swaps": (Swap("/swap", "unknown"),)}, "unknown", "/swap"),
        ("swap", {"swaps": None}, "unknown", "/proc/swaps"),
        ("ptrace", {}, "ok", "ptrace_scope 1"),
        ("ptrace", {"ptrace_scope": 0}, "unsafe", "any process of this user"),
        ("ptrace", {"ptrace_scope": 0, "user": 0}, "note", "root"),
        ("ptrace", {"ptrace_scope": None}, "unknown", "could not be read"),
        ("umask", {}, "ok", "077"),
        ("umask", {"umask": 0o022}, "note", "022"),
        ("umask", {"umask": 0o002}, "unsafe", "others may change"),
        ("umask", {"umask": None}, "unknown", "could not be read"),
        ("temporary directory", {}, "ok", "/tmp (1777)"),
        ("temporary directory", {"temporary": Directory("/t", 0o777)}, "unsafe", "others may replace files"),
        ("temporary directory", {"temporary": Directory("/t", 0o700, 1001)}, "unsafe", "belongs to user 1001"),
        ("temporary directory", {"temporary": Directory("/t", None, why="gone")}, "unknown", "gone"),
        ("Ray's directory", {}, "ok", "/tmp/ray (0777)"),
        ("Ray's directory", {"ray_temporary": Directory("/tmp/ray", 0o777)}, "unsafe", "object store"),
        ("Ray's directory", {"ray_temporary": Directory("/tmp/ray", None, why="gone")}, "unknown", "gone"),
        ("site key", {}, "ok", "/key"),
        ("site key", {"key_file": ("/k", None)}, "note", "not there yet"),
        ("site key", {"key_file": ("/k", "can be read or written by others (mode 0644)")}, "unsafe", "0644"),
        ("site key", {"key_file": None}, "unknown", "could not be looked for"),
        ("secrets in the environment", {}, "ok", "none"),
        ("secrets in the environment", {"secrets": ("KSMDIST_KEY",)}, "unsafe", "KSMDIST_KEY"),
        ("secrets in the environment", {"secrets": ("RAY_AUTH_TOKEN",)}, "note", "RAY_AUTH_TOKEN"),
        ("KSM of this host", {}, "note", "off"),
        ("KSM of this host", {"ksm": {"run": "1"}}, "note", "on: guests here"),
        ("KSM of this host", {"ksm": None}, "note", "none, or"),
        ("what capture needs", {}, "note", "without CAP_SYS_PTRACE, CAP_SYS_ADMIN"),
        ("what capture needs", {"capabilities": 1 << 19 | 1 << 21}, "note", "both capabilities"),
        ("packages", {}, "ok", "2 as pyproject.toml asks for"),
        ("packages", {"packages": (("ray", "2.59.1", "==2.60.0"),)}, "unsafe", "ray 2.59.1 (asked for: ==2.60.0)"),
        ("packages", {"packages": (("mmh3", None, ">=5.1"),)}, "unsafe", "mmh3 is missing"),
        ("packages", {"packages": (("mmh3", "5.2.dev1", ">=5.1"),)}, "unknown", "cannot be compared: mmh3"),
        ("packages", {"packages": ()}, "unknown", "could not be read"),
    ],
)
def test_checks_of_a_host(check: str, facts: dict[str, Any], state: str, said: str) -> None:
    one = found(doctor.of_host(replace(HOST, **facts)), check)
    assert (one.state, said in one.found) == (state, True), one
    assert bool(one.advice) or state in ("ok", "note"), "what is wrong says what to do"


def node(name: str, address: str = "198.51.100.1", **facts: Any) -> Node:
    return Node(name, address, replace(HOST, **facts), skew_s=(-0.1, 0.1))


LOST = Node("green", "198.51.100.1", None, "No module named 'ksmdist.hosts'")
CLIENT = (Listening("0.0.0.0", 10001, "client server"),)
BOARD = (Listening("0.0.0.0", 8265, "dashboard"),)


@pytest.mark.parametrize(
    ("check", "facts", "state", "said"),
    [
        ("token", {}, "ok", "refused"),
        ("token", {"refuses": False}, "unsafe", "let in a driver"),
        ("token", {"refuses": None, "said": "no answer in 50 s"}, "unknown", "no answer"),
        ("dashboard", {}, "ok", "none"),
        ("dashboard", {"nodes": (replace(NODE, host=None),)}, "unknown", "could not be looked at"),
        ("dashboard", {"dashboard": Dashboard("http://127.0.0.1:8265", True)}, "ok", "asks for a token"),
        ("dashboard", {"dashboard": Dashboard("http://127.0.0.1:8265", False)}, "unsafe", "takes jobs from whoever"),
        ("dashboard", {"dashboard": Dashboard("http://198.51.100.1:8265", True)}, "note", "others reach"),
        ("dashboard", {"dashboard": Dashboard("http://198.51.100.1:8265", None, "no route")}, "unknown", "no route"),
        (
            "dashboard",
            {
                "dashboard": Dashboard("http://127.0.0.1:8265", True),
                "nodes": (replace(NODE, host=replace(HOST, listening=BOARD)),),
            },
            "note",
            "on an address that others reach",
        ),
        ("ports", {}, "note", "1 of GCS; metrics"),
        ("ports", {"refuses": False}, "unsafe", "no token asked for: 1 of GCS"),
        ("ports", {"refuses": None}, "unknown", "1 of GCS"),
        ("ports", {"nodes": (NODE, LOST)}, "unknown", "not looked at: green"),
        ("ports", {"nodes": (node("blue", listening=(Listening("127.0.0.1", 1, "GCS"),)),)}, "ok", "loopback alone"),
        ("ports", {"nodes": (node("blue", listening=CLIENT),), "refuses": False}, "unsafe", "blue port 10001"),
        ("encryption", {}, "ok", "one address"),
        ("encryption", {"nodes": (NODE, node("green", "198.51.100.2"))}, "unsafe", "2 addresses"),
        ("encryption", {"nodes": (NODE, node("green", "198.51.100.2")), "tls": True}, "ok", "RAY_USE_TLS"),
        ("versions", {}, "ok", "equal on 1 nodes: python 3.11.7, ray 2.60.0"),
        (
            "versions",
            {"nodes": (NODE, node("green", versions={"python": "3.12.1", "ray": "2.60.0"}))},
            "unsafe",
            "python: 3.11.7 on blue, 3.12.1 on green",
        ),
        ("versions", {"nodes": (NODE, LOST)}, "unknown", "green: No module named"),
        ("names of nodes", {"nodes": (NODE, node("green"))}, "ok", "blue, green"),
        ("names of nodes", {"nodes": (NODE, node("blue"))}, "unsafe", "more than one node goes by blue"),
        ("clocks", {}, "ok", "within 2 s"),
        ("clocks", {"nodes": (replace(NODE, skew_s=(60.0, 61.0)),)}, "note", "apart: blue +60 s"),
        ("clocks", {"nodes": (replace(NODE, skew_s=(-70.0, 5.0)),)}, "note", "not compared to 2 s: blue"),
        ("clocks", {"nodes": (LOST,)}, "note", "not compared to 2 s: green"),
    ],
)
def test_checks_of_a_cluster(check: str, facts: dict[str, Any], state: str, said: str) -> None:
    one = found(doctor.of_cluster(replace(CLUSTER, **facts)), check, "Ray")
    assert (one.state, said in one.found) == (state, True), one
    assert bool(one.advice) or state in ("ok", "note")


def test_nodes_that_are_alike_are_said_once() -> None:
    same = doctor.of_cluster(replace(CLUSTER, nodes=(NODE, node("green"))))
    assert {one.where for one in same} == {"Ray", "node blue, green"}
    other = doctor.of_cluster(replace(CLUSTER, nodes=(NODE, node("green", core_limit=-1))))
    assert {one.where for one in other} == {"Ray", "node blue", "node green"}
    assert "site key" not in {one.name for one in other}


def test_exit_codes() -> None:
    ok, note, unknown, unsafe = (Finding("x", state, "") for state in ("ok", "note", "unknown", "unsafe"))
    assert doctor.exit_code([ok, note]) == 0
    assert doctor.exit_code([ok, unknown]) == 3
    assert doctor.exit_code([unknown, unsafe, ok]) == 1


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("5.1", ">=5.1.0", True),
        ("5.0.9", ">=5.1", False),
        ("0.29.0", "<0.29,>=0.16", False),
        ("0.28.1", "<0.29,>=0.16", True),
        ("2.60.0+cu1", "==2.60.0", True),
        ("1.0", "", True),
        ("1.0rc1", ">=1.0", None),
        ("1.0", "~=1.0", None),
    ],
)
def test_versions_are_compared_by_number(version: str, wanted: str, fits: bool | None) -> None:
    assert doctor.fits(version, wanted) is fits


def test_what_swap_lies_on(tmp_path: Path) -> None:
    def device(name: str, below: tuple[str, ...] = (), **files: str) -> Path:
        path = tmp_path / name
        (path / "slaves").mkdir(parents=True)
        for one in below:
            (path / "slaves" / one).symlink_to(tmp_path / one)
        for file, text in files.items():
            target = path / file.replace("__", "/")
            target.parent.mkdir(exist_ok=True)
            target.write_text(text)
        return path

    disk = device("sda2")
    crypt = device("dm-0", ("sda2",), dm__uuid="CRYPT-LUKS2-0-x\n")
    assert hosts.swap_kind(disk) == "plain"
    assert hosts.swap_kind(crypt) == "encrypted"
    assert hosts.swap_kind(device("dm-1", ("dm-0",), dm__uuid="LVM-x")) == "encrypted"
    assert hosts.swap_kind(device("dm-2", ("dm-0", "sda2"), dm__uuid="LVM-y")) == "plain"
    assert hosts.swap_kind(device("zram0", backing_dev="none\n")) == "memory"
    assert hosts.swap_kind(device("zram1", backing_dev="/dev/sda2\n")) == "unknown"
    assert hosts.swap_kind(tmp_path / "gone") == "unknown"


def test_a_run_directory(tmp_path: Path) -> None:
    run = ksmdist.run(faults.images(tmp_path, 1), tmp_path / "run", Settings(), "inline").path

    def state(path: Path = run) -> Finding:
        return found(doctor.of_host(HOST, [hosts.look_at_run(str(path))]), f"run directory {path}")

    assert state().state == "ok"
    tmp_path.chmod(0o755)
    guarded = hosts.look_at_run(str(run)).guarded  # pytest's own folders are 0700
    (run / "run.json").chmod(0o644)
    assert state().state == ("ok" if guarded else "unsafe")
    opened = replace(hosts.look_at_run(str(run)), guarded=False)
    one = found(doctor.of_host(HOST, [opened]), f"run directory {run}")
    assert (one.state, "run.json (0644)" in one.found) == ("unsafe", True)
    (run / "extra").symlink_to("/etc/passwd")
    assert (state().state, "extra" in state().found) == ("unsafe", True)
    assert state(tmp_path / "gone").state == "unknown"
    assert state(tmp_path / "image0.raw").state == "unknown"


def test_facts_of_this_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("KSMDIST_KEY", "00" * 32)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    key = tmp_path / "ksmdist" / "key"
    host = hosts.look(str(tmp_path))
    assert host.key_file == (str(key), None)
    key.parent.mkdir(mode=0o700)
    key.write_text("11" * 32)
    key.chmod(0o640)
    host = hosts.look(str(tmp_path))
    assert host.key_file is not None
    assert "0640" in str(host.key_file[1])
    assert host.secrets[0] == "KSMDIST_KEY"
    umask = os.umask(0)
    os.umask(umask)
    assert host.umask == umask
    assert host.temporary == host.ray_temporary
    assert host.temporary.mode == stat.S_IMODE(tmp_path.stat().st_mode)
    assert found(doctor.of_host(host), "packages").state == "ok"
    assert "00" * 32 not in repr(host)


def test_the_command_alone() -> None:
    done = invoke("doctor", "--no-cluster", "--json")
    told = json.loads(done.stdout)
    assert {one["state"] for one in told["findings"]} <= set(doctor.STATES)
    states = told["summary"]
    assert sum(states.values()) == len(told["findings"])
    assert done.exit_code == (1 if states["unsafe"] else 3 if states["unknown"] else 0)
    plain = invoke("doctor", "--no-cluster", "/nowhere/run")
    assert "UNKNOWN run directory /nowhere/run: No such file or directory" in plain.stdout
    assert plain.exit_code == (1 if states["unsafe"] else 3)


# Clusters


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def head(mode: str, *options: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """A cluster of one node with a dashboard, started as docs/clusters.md has it: its address, who may join it."""
    folder = Path(tempfile.mkdtemp(prefix="kt"))  # short: the paths of sockets have 107 bytes
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KSMDIST_"))}
    environment |= {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    log = folder / "log"

    def start() -> tuple[subprocess.Popen[bytes], int]:
        gcs, dashboard, agent, client, metrics = free_ports(5)
        command = [*clusters.RAY, "start", "--head", "--block", "--num-cpus=0", "--disable-usage-stats", *options]
        command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"]
        command += [f"--temp-dir={folder}/ray", f"--object-store-memory={80 << 20}", "--node-ip-address=127.0.0.1"]
        with open(log, "w") as sink:
            started = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink, start_new_session=True)
        until = time.monotonic() + 120
        while started.poll() is None and "Ray runtime started" not in log.read_text():
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        return started, gcs

    def stop(started: subprocess.Popen[bytes]) -> None:
        started.terminate()  # with --block it stops what it has started, and no other cluster
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait(30)

    started, gcs = start()
    try:
        for _ in range(2):
            if started.poll() is not None:  # another process has taken one of the ports meanwhile
                stop(started)
                started, gcs = start()
        assert started.poll() is None, log.read_text()
        yield f"127.0.0.1:{gcs}", environment
    finally:
        stop(started)
        shutil.rmtree(folder, ignore_errors=True)


def examine(address: str, environment: Mapping[str, str]) -> tuple[int, list[Finding]]:
    command = [sys.executable, "-m", "ksmdist", "doctor", "--address", address, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=dict(environment))
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [Finding(**one) for one in json.loads(done.stdout)["findings"]]


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_with_a_token() -> None:
    with head("token", "--dashboard-host=127.0.0.1") as (address, environment):
        _, findings = examine(address, environment)
        states = {one.name: one.state for one in findings if one.where == "Ray"}
        assert states.pop("ports") == "note"
        assert set(states.values()) == {"ok"}, findings
        assert "asks for a token" in found(findings, "dashboard").found
        assert found(findings, "Ray's directory").state == "ok", "its folder is 0700"
        where = found(findings, "Ray's directory").where
        assert found(findings, "secrets in the environment", where).state == "note"

        stranger = {**environment, "RAY_AUTH_TOKEN": "0" * 64}
        code, findings = examine(address, stranger)  # Ray tries for 20 s
        assert code in (1, 3)
        one = found(findings, "cluster")
        assert (one.state, "Ray cannot be reached" in one.found) == ("unknown", True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_without_a_token() -> None:
    with head("disabled", "--dashboard-host=0.0.0.0") as (address, environment):
        code, findings = examine(address, environment)
    assert code == 1
    for name in ("token", "dashboard", "ports"):
        assert found(findings, name).state == "unsafe", findings
    assert "takes jobs from whoever reaches it" in found(findings, "dashboard").found
    assert "on an address that others reach" in found(findings, "dashboard").found


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_of_several_nodes() -> None:
    """Each is asked, the head that computes nothing too; one that does not answer is not waited for."""
    with clusters.raylets(["blue", "green"]) as (address, made, nodes):
        clusters.add(made, "blue")
        cluster = looked_at.look(address)
        os.kill(nodes["green"].all_processes["raylet"][0].process.pid, signal.SIGSTOP)
        try:
            stuck = RayEngine(address).ask(str, 5.0)
        finally:
            ray.shutdown()
            os.kill(nodes["green"].all_processes["raylet"][0].process.pid, signal.SIGCONT)
    assert sorted(node.name for node in cluster.nodes if not node.head) == ["blue", "blue", "green"]
    assert [node.head for node in cluster.nodes].count(True) == 1
    assert all(node.host is not None for node in cluster.nodes), cluster
    findings = doctor.of_cluster(cluster)
    assert (found(findings, "names of nodes").state, found(findings, "token").state) == ("unsafe", "unsafe")
    assert "goes by blue" in found(findings, "names of nodes").found
    assert found(findings, "versions").state == "ok"
    assert {answer.name for answer in stuck if answer.why == "no answer in 5 s"} == {"green"}
    assert {type(answer.result) for answer in stuck if answer.name == "blue"} == {str}
