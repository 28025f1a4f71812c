"""Ray clusters on this machine: several raylets, and hosts in network namespaces with file systems of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from ksmdist.engines.ray import HOST_LABEL

RAY = [str(Path(sys.executable).with_name("ray"))]


@contextlib.contextmanager
def raylets(
    names: Sequence[str], cpus: int = 1, head: Mapping[str, Any] | None = None, **options: Any
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """A head that computes nothing, and a raylet of each of these names: address, cluster, nodes by name.

    head, options: of Ray's, for the head, and for the raylets.
    """
    arguments = {"num_cpus": 0, "include_dashboard": False, **(head or {})}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        nodes = {name: add(cluster, name, cpus, **options) for name in names}
        cluster.wait_for_nodes()
        yield cluster.address, cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


def add(cluster: Any, name: str, cpus: int = 1, **options: Any) -> Any:
    """One raylet more."""
    return cluster.add_node(num_cpus=cpus, labels={HOST_LABEL: name}, wait=True, **options)


def kill(node: Any) -> None:
    """SIGKILL a raylet and its workers, as when its host loses power."""
    raylets = [process.process.pid for process in node.all_processes["raylet"]]
    for pid in [*raylets, *workers(node)]:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def workers(node: Any) -> dict[int, str]:
    """Processes that a raylet has started, and what each is doing."""
    raylets = {process.process.pid for process in node.all_processes["raylet"]}
    found = {}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(entry)
            parent = int(Path(f"/proc/{pid}/status").read_text().split("PPid:")[1].split()[0])
            if parent in raylets:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


@dataclass
class Host:
    """A network namespace with an address on a bridge, and a mount namespace in which /images is its own."""

    name: str
    address: str
    images: Path
    namespace: str
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A command line that runs in the host."""
        mount = f'mount --make-rprivate / && mount --bind {self.images} {MOUNT} && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "-m", "sh", "-c", mount, "sh", *arguments]


MOUNT = Path("/mnt/ksmdist-test-images")


@contextlib.contextmanager
def hosts(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Host]]]:
    """Hosts, each in a network namespace, with a raylet in each but the first, which is the head; its address.

    Takes root. The addresses are of TEST-NET-2 (RFC 5737), on a bridge that is gone afterwards.
    """
    tag = uuid.uuid4().hex[:6]
    bridge = f"kd{tag}"
    made: dict[str, Host] = {}
    MOUNT.mkdir(exist_ok=True)

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    temporary = tempfile.mkdtemp(prefix="kd")  # short: the paths of sockets have 107 bytes
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names, 1):
            images = folder / f"disk-of-{name}"
            images.mkdir()
            host = made[name] = Host(name, f"198.51.100.{number}", images, f"{bridge}-{name}")
            outer, inner = f"{bridge}o{number}", f"{bridge}i{number}"
            ip("netns", "add", host.namespace)
            ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            ip("link", "set", outer, "master", bridge, "up")
            ip("link", "set", inner, "netns", host.namespace)
            for arguments in (
                ["addr", "add", f"{host.address}/24", "dev", inner],
                ["link", "set", inner, "up"],
                ["link", "set", "lo", "up"],
            ):
                subprocess.run(["ip", "-n", host.namespace, *arguments], check=True)
        head = next(iter(made.values()))
        address = f"{head.address}:6399"
        for host in made.values():
            start = [*RAY, "start", "--block", "--node-ip-address", host.address, "--disable-usage-stats"]
            start += ["--num-cpus", "0" if host is head else "1", "--labels", f"{HOST_LABEL}={host.name}"]
            start += ["--object-store-memory", str(80 << 20), "--temp-dir", f"{temporary}/{host.name}"]
            start += (
                ["--head", "--port", "6399", "--include-dashboard=false"] if host is head else ["--address", address]
            )
            environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
            environment.pop("RAY_ADDRESS", None)
            host.running.append(
                subprocess.Popen(
                    host.command(start),
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        yield address, made
    finally:
        for host in made.values():
            pids = subprocess.run(
                ["ip", "netns", "pids", host.namespace], capture_output=True, text=True
            ).stdout.split()
            for pid in map(int, pids):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            for process in host.running:
                process.wait(timeout=30)
            subprocess.run(["ip", "netns", "del", host.namespace], check=False)
        subprocess.run(["ip", "link", "del", bridge], check=False)
        subprocess.run(["rm", "-rf", temporary], check=False)
        with contextlib.suppress(OSError):
            MOUNT.rmdir()
