"""What of a machine and a cluster is unsafe for memory images: facts in, findings out.

machine.py reads the facts; this module looks at nothing itself. Memory images are secrets: what is called unsafe here
lets others read what a run reads, or run what they like where it runs. What could not be found out is unknown, never
ok.
"""

from __future__ import annotations

import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = [
    "EXIT_UNKNOWN",
    "EXIT_UNSAFE",
    "STATES",
    "Cluster",
    "Dashboard",
    "Directory",
    "Finding",
    "Host",
    "Listening",
    "Node",
    "Swap",
    "exit_code",
    "of_cluster",
    "of_host",
]

STATES = ("ok", "note", "unsafe", "unknown")
"""note: to be known, and neither safe nor unsafe."""

EXIT_UNSAFE, EXIT_UNKNOWN = 1, 3

_SKEW_S = 2.0
_CAP_SYS_PTRACE, _CAP_SYS_ADMIN = 19, 21  # include/uapi/linux/capability.h
_ONE_MACHINE = ("127.", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class Finding:
    """A check and what came of it. where: "" for this host, Ray, or nodes; advice: "" where there is nothing to do."""

    name: str
    state: str
    found: str
    advice: str = ""
    where: str = ""

    def as_dict(self) -> dict[str, str]:
        """For --json."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Directory:
    """A place that holds secrets. mode: permission bits of it, None where it cannot be looked at; owner: user number.

    guarded: whether a directory above it keeps all but its owner and root out; open: files and directories in it,
    relative, that others may read or write; links: symbolic links in it
    """

    path: str
    mode: int | None
    owner: int = 0
    guarded: bool = False
    open: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class Swap:
    """A swap area of /proc/swaps. kind: encrypted (dm-crypt), memory (zram), plain or unknown."""

    path: str
    kind: str


@dataclass(frozen=True, slots=True)
class Listening:
    """A TCP socket that one of Ray's processes listens on. process: its name, such as raylet."""

    address: str
    port: int
    process: str


@dataclass(frozen=True, slots=True)
class Host:
    """What a machine is like for the process that asked; None everywhere for what could not be found out.

    user: number of the effective user; capabilities: CapEff; core_limit: soft RLIMIT_CORE, in bytes, -1 without limit;
    packages: (name, installed or None, what pyproject.toml asks for); key_file: (path, why it is unsafe, "" if it is
    not, None where there is none); secrets: names of environment variables that hold one; ksm: knobs by name
    """

    name: str
    user: int
    capabilities: int | None
    core_limit: int | None
    core_pattern: str | None
    swaps: tuple[Swap, ...] | None
    umask: int | None
    ptrace_scope: int | None
    temporary: Directory
    ray_temporary: Directory | None
    key_file: tuple[str, str | None] | None
    secrets: tuple[str, ...]
    ksm: dict[str, str] | None
    pagemap_scan: bool | None
    packages: tuple[tuple[str, str | None, str], ...]
    versions: dict[str, str]
    listening: tuple[Listening, ...] | None


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a cluster. host: None where nothing could be run there, and why; skew_s: (least, most) seconds that its
    clock may be ahead of this one."""

    name: str
    address: str
    host: Host | None
    why: str = ""
    skew_s: tuple[float, float] | None = None
    head: bool = False


@dataclass(frozen=True, slots=True)
class Dashboard:
    """Ray's dashboard. url: "" for none; asks: whether it refused a request without a token, None where unreachable."""

    url: str
    asks: bool | None
    said: str = ""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster as a driver finds it. refuses: whether it refused a driver without a token, None if that is not known.

    said: what it answered; mode: RAY_AUTH_MODE as this driver has it; tls: whether Ray encrypts (RAY_USE_TLS)
    """

    address: str
    refuses: bool | None
    said: str
    mode: str
    tls: bool
    dashboard: Dashboard
    nodes: tuple[Node, ...]


def of_host(host: Host, runs: Sequence[Directory] = (), where: str = "") -> list[Finding]:
    """Findings about one machine, and about run directories on it. where: its name, "" for this one.

    Another's key file and capabilities are not looked at: a worker is given seeds, and captures nothing.
    """
    found = [
        _core_dumps(host),
        _swap(host),
        _ptrace(host),
        _umask(host),
        _shared(host.temporary, "temporary directory", host.user),
        _secrets(host),
        _packages(host),
        _ksm(host),
    ]
    if not where:
        found += [_key(host), _capture(host)]
    if host.ray_temporary is not None:
        found.insert(5, _rays(host.ray_temporary, host.user))
    found += [_run(run) for run in runs]
    return [replace(one, where=where) for one in found]


def of_cluster(cluster: Cluster) -> list[Finding]:
    """Findings about a cluster, and about each machine of it: once for nodes of which the same is found."""
    found = [
        _token(cluster),
        _dashboard(cluster),
        _ports(cluster),
        _encrypted(cluster),
        _versions(cluster),
        _names(cluster),
        _clocks(cluster),
    ]
    found = [replace(one, where="Ray") for one in found]
    alike: dict[tuple[Finding, ...], list[str]] = {}
    for node in cluster.nodes:
        if node.host is not None:
            alike.setdefault(tuple(of_host(node.host, where="?")), []).append(node.name)
    for findings, names in alike.items():
        where = ", ".join(dict.fromkeys(names))
        found += [replace(one, where=f"node {where}") for one in findings]
    return found


def exit_code(findings: Iterable[Finding]) -> int:
    """0 if nothing is unsafe or unknown, EXIT_UNSAFE if anything is unsafe, EXIT_UNKNOWN if something is not known."""
    states = {finding.state for finding in findings}
    return EXIT_UNSAFE if "unsafe" in states else EXIT_UNKNOWN if "unknown" in states else 0


def _core_dumps(host: Host) -> Finding:
    """core(5): a pipe gets the dump whatever the limit, but for a limit of 1; a file where that is a page or more."""
    name, limit, pattern = "core dumps", host.core_limit, host.core_pattern
    if limit is None or pattern is None:
        return Finding(name, "unknown", "RLIMIT_CORE or core_pattern could not be read", "see ulimit -c, core(5)")
    if pattern.startswith("|"):
        if limit == 1:
            return Finding(name, "ok", "a collector is set, and RLIMIT_CORE is 1, which keeps dumps from it")
        return Finding(
            name,
            "unsafe",
            f"a crash hands this process's memory to {pattern[1:].split(' ')[0]}",
            "prlimit --core=1 ksmdist ..., or switch the collector off for this host",
        )
    if limit in (0, 1):
        return Finding(name, "ok", f"none is written: RLIMIT_CORE is {limit}")
    return Finding(name, "unsafe", f"a crash writes memory to {pattern or 'core'}", "ulimit -c 0")


def _swap(host: Host) -> Finding:
    name = "swap"
    if host.swaps is None:
        return Finding(name, "unknown", "/proc/swaps could not be read", "see swapon --show")
    plain = [swap.path for swap in host.swaps if swap.kind == "plain"]
    unknown = [swap.path for swap in host.swaps if swap.kind == "unknown"]
    if plain:
        advice = "swapoff, or swap to dm-crypt or zram: pages of images may be written there and stay"
        return Finding(name, "unsafe", f"not encrypted: {', '.join(plain)}", advice)
    if unknown:
        advice = "see whether what lies below it is encrypted (lsblk)"
        return Finding(name, "unknown", f"cannot be told whether it is encrypted: {', '.join(unknown)}", advice)
    return Finding(name, "ok", ", ".join(f"{swap.path} ({swap.kind})" for swap in host.swaps) or "none")


def _ptrace(host: Host) -> Finding:
    """Documentation/admin-guide/LSM/Yama.rst: from 1 on only a parent may look into a process."""
    scope, name = host.ptrace_scope, "ptrace"
    if scope is None:
        found = "kernel.yama.ptrace_scope could not be read"
        return Finding(name, "unknown", found, "run ksmdist as a user that runs nothing else")
    if host.user == 0:
        return Finding(name, "note", "root: only root's other processes read the memory of ksmdist, and they read all")
    if scope == 0:
        advice = "sysctl kernel.yama.ptrace_scope=1, or run ksmdist as a user that runs nothing else"
        return Finding(
            name, "unsafe", "any process of this user may read the memory of ksmdist (ptrace_scope 0)", advice
        )
    return Finding(name, "ok", f"ptrace_scope {scope}")


def _umask(host: Host) -> Finding:
    name = "umask"
    if host.umask is None:
        return Finding(name, "unknown", "could not be read", "umask 077")
    said = f"{host.umask:03o}"
    if host.umask & 0o022 != 0o022:
        return Finding(name, "unsafe", f"{said}: what Ray and other tools write, others may change", "umask 077")
    if host.umask & 0o077 != 0o077:
        found = f"{said}: ksmdist's own files are 0600 all the same; Ray's logs others may read"
        return Finding(name, "note", found, "umask 077 before Ray is started")
    return Finding(name, "ok", said)


def _shared(directory: Directory, name: str, user: int) -> Finding:
    """A directory that many may write to must be sticky (chmod(1)): else others may put their files for ours."""
    if directory.mode is None:
        return Finding(name, "unknown", f"{directory.path}: {directory.why}", "set TMPDIR to a directory of your own")
    said = f"{directory.path} ({directory.mode:04o})"
    if directory.mode & 0o022 and not directory.mode & stat.S_ISVTX and not directory.guarded:
        return Finding(name, "unsafe", f"{said}: others may replace files in it", f"chmod +t {directory.path}")
    if directory.owner not in (user, 0):
        return Finding(name, "unsafe", f"{said} belongs to user {directory.owner}", "set TMPDIR to one of your own")
    return Finding(name, "ok", said)


def _rays(directory: Directory, user: int) -> Finding:
    """Ray's sessions: logs, sockets of the object store, and what it spills; Ray makes them 0777 whatever the umask."""
    name = "Ray's directory"
    advice = "start Ray with --temp-dir in a directory that is 0700"
    if directory.mode is None:
        return Finding(name, "unknown", f"{directory.path}: {directory.why}", advice)
    said = f"{directory.path} ({directory.mode:04o})"
    if directory.guarded or not directory.mode & 0o077:
        return Finding(name, "ok", said)
    return Finding(
        name,
        "unsafe",
        f"{said}: others on that host reach Ray's logs, sockets, object store and spilled objects",
        advice,
    )


def _key(host: Host) -> Finding:
    name = "site key"
    if host.key_file is None:
        return Finding(name, "unknown", "could not be looked for", "give --key-file")
    path, why = host.key_file
    if why is None:
        return Finding(name, "note", f"{path} is not there yet: the first run makes it")
    if why:
        return Finding(name, "unsafe", f"{path} {why}", f"chmod 600 {path}; if others had it, make a new one")
    return Finding(name, "ok", path)


def _secrets(host: Host) -> Finding:
    """A token is Ray's own way, and a key has a better one: its file."""
    name = "secrets in the environment"
    if not host.secrets:
        return Finding(name, "ok", "none of ksmdist's or Ray's")
    return Finding(
        name,
        "note" if host.secrets == ("RAY_AUTH_TOKEN",) else "unsafe",
        f"{', '.join(host.secrets)}: all that is started from here has it, and the user's others find it in /proc",
        "keep it in a file: --key-file, RAY_AUTH_TOKEN_PATH",
    )


def _ksm(host: Host) -> Finding:
    """Documentation/admin-guide/mm/ksm.rst."""
    name = "KSM of this host"
    if host.ksm is None:
        return Finding(name, "note", "this kernel has none, or it cannot be read")
    said = ", ".join(f"{knob}={value}" for knob, value in sorted(host.ksm.items()))
    if host.ksm.get("run") == "1":
        found = f"on: guests here that are marked are merged now, and may tell each other's pages by time ({said})"
        return Finding(name, "note", found, "switch it off (run=2) where guests do not trust each other")
    return Finding(name, "note", f"off ({said})")


def _capture(host: Host) -> Finding:
    missing = []
    if host.pagemap_scan is False:
        missing.append("PAGEMAP_SCAN (Linux 6.7)")
    held = host.capabilities or 0
    for bit, capability in ((_CAP_SYS_PTRACE, "CAP_SYS_PTRACE"), (_CAP_SYS_ADMIN, "CAP_SYS_ADMIN")):
        if not held >> bit & 1:
            missing.append(capability)
    said = f"without {', '.join(missing)}: see ksmdist capture" if missing else "PAGEMAP_SCAN and both capabilities"
    return Finding("what capture needs", "note", said)


def _packages(host: Host) -> Finding:
    name = "packages"
    if not host.packages:
        return Finding(name, "unknown", "what ksmdist asks for could not be read", "install ksmdist again")
    wrong = [
        f"{package} {installed or 'is missing'} (asked for: {wanted or 'any'})"
        for package, installed, wanted in host.packages
        if installed is None or fits(installed, wanted) is False
    ]
    unclear = [p for p, installed, wanted in host.packages if installed and fits(installed, wanted) is None]
    advice = "install with the pinned hashes: make setup, or pip install --require-hashes -r constraints.txt"
    if wrong:
        return Finding(name, "unsafe", "; ".join(wrong), advice)
    if unclear:
        return Finding(name, "unknown", f"versions that cannot be compared: {', '.join(unclear)}", advice)
    return Finding(name, "ok", f"{len(host.packages)} as pyproject.toml asks for")


def fits(version: str, wanted: str) -> bool | None:
    """Whether a version is one of those that a specifier (PEP 440: ==, >=, >, <=, <, !=) names; None if unclear."""
    have = _numbers(version)
    for clause in filter(None, map(str.strip, wanted.split(","))):
        parts = re.fullmatch(r"(==|!=|>=|<=|>|<)\s*([0-9.]+)", clause)
        if parts is None or have is None:
            return None
        bound = _numbers(parts[2]) or ()
        width = max(len(have), len(bound))
        left, right = (part + (0,) * (width - len(part)) for part in (have, bound))
        holds = {
            "==": left == right,
            "!=": left != right,
            ">=": left >= right,
            "<=": left <= right,
            ">": left > right,
            "<": left < right,
        }
        if not holds[parts[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...] | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\+.*|\.post\d+)?", version.rstrip("."))
    return None if found is None else tuple(map(int, found[1].split(".")))


def _run(run: Directory) -> Finding:
    name = f"run directory {run.path}"
    if run.mode is None:
        return Finding(name, "unknown", run.why, "give a directory that `ksmdist run` wrote")
    if run.links:
        return Finding(name, "unsafe", f"has symbolic links: {_some(run.links)}", "remove them: a run has none")
    opened = ([f"itself ({run.mode:04o})"] if run.mode & 0o077 else []) + list(run.open)
    if opened and not run.guarded:
        return Finding(name, "unsafe", f"open to others: {_some(opened)}", f"chmod -R go= {run.path}")
    return Finding(name, "ok", "for its owner alone" if not opened else "open itself, in a directory that is not")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _token(cluster: Cluster) -> Finding:
    name = "token"
    advice = "start every node with a token (RAY_AUTH_MODE=token): who reaches Ray without one runs code as its user"
    if cluster.refuses is None:
        found = f"whether a driver without a token is refused could not be found out: {cluster.said}"
        return Finding(name, "unknown", found, advice)
    if not cluster.refuses:
        return Finding(name, "unsafe", f"{cluster.address} let in a driver that had none", advice)
    return Finding(name, "ok", f"{cluster.address} refused a driver that had none")


def _dashboard(cluster: Cluster) -> Finding:
    name, board = "dashboard", cluster.dashboard
    advice = "start the head with --include-dashboard=false, or --dashboard-host=127.0.0.1 and a token"
    heads = [node.host for node in cluster.nodes if node.head]
    seen = [sock for host in heads if host for sock in host.listening or () if sock.process == "dashboard"]
    exposed = [sock for sock in seen if not _loopback(sock.address) and str(sock.port) == board.url.rpartition(":")[2]]
    if not board.url:
        if not heads or None in [host and host.listening for host in heads]:
            return Finding(name, "unknown", "the cluster names none, and its head could not be looked at", advice)
        return Finding(name, "ok", "none")
    where = "on an address that others reach" if exposed or not _loopback(board.url) else "on loopback"
    if board.asks:
        state = "note" if exposed or not _loopback(board.url) else "ok"
        return Finding(name, state, f"{board.url}, {where}; it asks for a token", advice if state == "note" else "")
    if board.asks is None:
        return Finding(name, "unknown", f"{board.url} did not answer: {board.said}", advice)
    return Finding(name, "unsafe", f"{board.url}, {where}, takes jobs from whoever reaches it", advice)


def _ports(cluster: Cluster) -> Finding:
    """Ray's servers bind to all interfaces; the token keeps callers out of all but metrics."""
    name = "ports"
    unseen = [node.name for node in cluster.nodes if node.host is None or node.host.listening is None]
    opened = [
        (node.name, sock)
        for node in cluster.nodes
        if node.host is not None
        for sock in node.host.listening or ()
        if not _loopback(sock.address)
    ]
    client = [f"{node} port {sock.port}" for node, sock in opened if sock.process == "client server"]
    kinds = Counter(sock.process for _, sock in opened)
    said = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
    advice = "let a firewall keep all but the cluster's nodes away from Ray's ports"
    if client and not cluster.refuses:
        return Finding(name, "unsafe", f"Ray Client takes drivers from anywhere: {', '.join(client)}", advice)
    if opened and cluster.refuses is False:
        return Finding(name, "unsafe", f"not on loopback, with no token asked for: {said}", advice)
    if unseen or (opened and cluster.refuses is None):
        more = f"; not looked at: {', '.join(unseen)}" if unseen else ""
        return Finding(name, "unknown", f"not on loopback: {said or 'none seen'}{more}", advice)
    if opened:
        return Finding(name, "note", f"not on loopback: {said}; metrics are read without the token", advice)
    return Finding(name, "ok", "on loopback alone")


def _encrypted(cluster: Cluster) -> Finding:
    name = "encryption"
    hosts = {node.address for node in cluster.nodes}
    if cluster.tls:
        return Finding(name, "ok", "RAY_USE_TLS is set")
    if len(hosts) <= 1:
        return Finding(name, "ok", "not needed: all nodes have one address")
    return Finding(
        name,
        "unsafe",
        f"{len(hosts)} addresses, and RAY_USE_TLS is not set: token and digests cross the network readable",
        "set RAY_USE_TLS (Ray's documentation, TLS), or keep the cluster on a network of its own",
    )


def _versions(cluster: Cluster) -> Finding:
    name = "versions"
    lost = [f"{node.name}: {node.why}" for node in cluster.nodes if node.host is None]
    seen: dict[str, dict[str, list[str]]] = {}
    for node in cluster.nodes:
        for package, version in (node.host.versions if node.host else {}).items():
            seen.setdefault(package, {}).setdefault(version, []).append(node.name)
    differ = [
        f"{package}: " + ", ".join(f"{version} on {_some(nodes)}" for version, nodes in sorted(found.items()))
        for package, found in sorted(seen.items())
        if len(found) > 1
    ]
    advice = "install the same wheel and constraints.txt on every node"
    if differ:
        return Finding(name, "unsafe", "; ".join(differ), advice)
    if lost or not seen:
        return Finding(name, "unknown", "; ".join(lost) or "no node could be looked at", advice)
    said = ", ".join(f"{package} {next(iter(found))}" for package, found in sorted(seen.items()))
    return Finding(name, "ok", f"equal on {len(cluster.nodes)} nodes: {said}")


def _names(cluster: Cluster) -> Finding:
    twice = sorted(name for name, count in Counter(node.name for node in cluster.nodes).items() if count > 1)
    if twice:
        return Finding(
            "names of nodes",
            "unsafe",
            f"more than one node goes by {', '.join(twice)}: node:// may read another's file",
            "label each: ray start --labels ksmdist-host=NAME",
        )
    return Finding("names of nodes", "ok", ", ".join(node.name for node in cluster.nodes))


def _clocks(cluster: Cluster) -> Finding:
    """Nothing in a run depends on clocks; reading logs of several nodes does."""
    skews = [(node.name, node.skew_s) for node in cluster.nodes]
    apart = [
        f"{name} {sum(skew) / 2:+.0f} s" for name, skew in skews if skew and (skew[0] > _SKEW_S or skew[1] < -_SKEW_S)
    ]
    unsure = [name for name, skew in skews if skew is None or max(map(abs, skew)) > _SKEW_S]
    if apart:
        return Finding("clocks", "note", f"apart: {', '.join(apart)}", "run a time service: logs would mislead")
    if unsure:
        return Finding("clocks", "note", f"not compared to {_SKEW_S:.0f} s: {', '.join(unsure)}")
    return Finding("clocks", "ok", f"within {_SKEW_S:.0f} s")


def _loopback(address: str) -> bool:
    bare = address.rpartition("//")[2].strip("[]")
    return bare.startswith(_ONE_MACHINE)


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """How many findings are in each state."""
    return {state: sum(finding.state == state for finding in findings) for state in STATES}
