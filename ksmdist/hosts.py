"""What a host is like, for doctor.py to judge: read from /proc, /sys and the environment. Nothing is changed.

What cannot be read is None. The formats are those of proc(5), core(5), and Documentation/admin-guide of the kernel.
"""

from __future__ import annotations

import os
import re
import resource
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import TypeVar

from ksmdist import keys
from ksmdist.doctor import Directory, Host, Listening, Swap
from ksmdist.errors import EngineError
from ksmdist.images.proc import has_pagemap_scan
from ksmdist.sysfs import Ksm
from ksmdist.version import __version__

__all__ = ["look", "look_at_run", "swap_kind"]

_COMPARED = ("ray", "pyarrow", "numpy", "xxhash", "mmh3")
"""Packages that must be of one version on all nodes, besides Python and ksmdist: they make, or carry, the tables."""

_SECRETS = (keys.VARIABLE, "RAY_AUTH_TOKEN")
_KNOBS = ("run", "use_zero_pages", "max_page_sharing", "merge_across_nodes", "smart_scan", "advisor_mode")
_LISTEN = "0A"  # include/net/tcp_states.h
_MOST_ENTRIES = 100_000

T = TypeVar("T")


def look(ray_directory: str | None = None) -> Host:
    """Look at this host, for the process that asks. ray_directory: where Ray keeps its sessions."""
    status = _or_none(lambda: Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")) or ""
    key = keys.site_file(os.environ)
    return Host(
        name=os.uname().nodename,
        user=os.geteuid(),
        capabilities=_field(status, "CapEff", 16),
        core_limit=_or_none(lambda: resource.getrlimit(resource.RLIMIT_CORE)[0]),
        core_pattern=_or_none(lambda: Path("/proc/sys/kernel/core_pattern").read_text(encoding="utf-8").strip()),
        swaps=_or_none(_swaps),
        umask=_field(status, "Umask", 8),
        ptrace_scope=_or_none(_ptrace_scope),
        temporary=_directory(tempfile.gettempdir()),
        ray_temporary=None if ray_directory is None else _directory(ray_directory),
        key_file=_or_none(lambda: (str(key), _key_state(key))),
        secrets=tuple(name for name in _SECRETS if os.environ.get(name)),
        ksm=_ksm(),
        pagemap_scan=_or_none(has_pagemap_scan),
        packages=_packages(),
        versions={"python": python_version(), "ksmdist": __version__}
        | {name: _version(name) or "missing" for name in _COMPARED},
        listening=_or_none(_listening),
    )


def look_at_run(path: str) -> Directory:
    """Look at a run directory: what in it others may read or write, and symbolic links."""
    found = _directory(path)
    if found.mode is None or not stat.S_ISDIR(os.lstat(path).st_mode):
        return Directory(path, None, why=found.why or "is no directory")
    opened, links = [], []
    for at, folders, names in os.walk(path):
        for name in [*folders, *names]:
            full = os.path.join(at, name)
            with suppress(OSError):
                mode = os.lstat(full).st_mode
                inner = os.path.relpath(full, path)
                if stat.S_ISLNK(mode):
                    links.append(inner)
                elif mode & 0o077:
                    opened.append(f"{inner} ({stat.S_IMODE(mode):04o})")
        if len(opened) + len(links) > _MOST_ENTRIES:
            break
    return Directory(path, found.mode, found.owner, found.guarded, tuple(sorted(opened)), tuple(sorted(links)))


def _or_none(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (OSError, ValueError):
        return None


def _field(status: str, name: str, base: int) -> int | None:
    found = re.search(rf"^{name}:\s*([0-9a-f]+)$", status, re.M)
    return None if found is None else int(found[1], base)


def _directory(path: str) -> Directory:
    try:
        found = os.stat(path)
        real = Path(path).resolve()
        # Others need search permission on every directory above.
        guarded = any(not os.stat(above).st_mode & 0o011 for above in real.parents)
    except OSError as error:
        return Directory(path, None, why=os.strerror(error.errno or 0))
    return Directory(path, stat.S_IMODE(found.st_mode), found.st_uid, guarded)


def _key_state(path: Path) -> str | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    why = keys.unsafe(found, os.geteuid())
    above = path.parent.stat()
    if why is None and above.st_mode & 0o022:
        return f"is in a directory that others may write to (mode {stat.S_IMODE(above.st_mode):04o})"
    return why or ""


def _ptrace_scope() -> int:
    """A kernel without Yama is as one with 0: credentials alone decide (ptrace(2))."""
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii"))
    except FileNotFoundError:
        os.stat("/proc/sys/kernel")
        return 0


def _swaps() -> tuple[Swap, ...]:
    found = []
    for line in Path("/proc/swaps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()[1:]:
        name, kind = line.split()[:2]
        path = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), name)
        try:
            status = os.stat(path)
            device = status.st_rdev if kind == "partition" else status.st_dev
            found.append(Swap(path, swap_kind(Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))))
        except OSError:
            found.append(Swap(path, "unknown"))
    return tuple(found)


def swap_kind(device: Path) -> str:
    """encrypted, memory, plain or unknown, by the directory of a block device in sysfs, and of what it lies on.

    dm-crypt's UUIDs begin with CRYPT- (Documentation/admin-guide/device-mapper, libcryptsetup); zram may write pages
    back to a device (Documentation/admin-guide/blockdev/zram.rst).
    """
    try:
        real = device.resolve(strict=True)
        if real.name.startswith("zram"):
            back = real / "backing_dev"
            return "memory" if not back.exists() or back.read_text(encoding="utf-8").strip() == "none" else "unknown"
        uuid = real / "dm" / "uuid"
        if uuid.exists() and uuid.read_text(encoding="utf-8").startswith("CRYPT-"):
            return "encrypted"
        below = sorted((real / "slaves").iterdir()) if (real / "slaves").is_dir() else []
    except OSError:
        return "unknown"
    kinds = {swap_kind(one) for one in below}
    for kind in ("plain", "unknown"):
        if kind in kinds:
            return kind
    return kinds.pop() if len(kinds) == 1 else "encrypted" if kinds else "plain"


def _ksm() -> dict[str, str] | None:
    try:
        knobs = Ksm().knobs()
    except EngineError:
        return None
    return {name: knobs[name] for name in _KNOBS if name in knobs}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> tuple[tuple[str, str | None, str], ...]:
    """What ksmdist asks for, of its metadata (PEP 508); an extra only where it is there."""
    try:
        asked = metadata.requires("ksmdist") or []
    except metadata.PackageNotFoundError:
        return ()
    found = []
    for line in asked:
        wanted, _, marker = line.partition(";")
        parts = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?([^)]*)\)?", wanted)
        if parts is not None:
            installed = _version(parts[1])
            if installed is not None or "extra" not in marker:
                found.append((parts[1], installed, parts[2].strip()))
    return tuple(found)


def _listening() -> tuple[Listening, ...]:
    """TCP sockets that Ray's processes listen on, of this user's processes; ValueError where none can be told."""
    where: dict[str, tuple[str, int]] = {}
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):
            for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN:
                    address, _, port = fields[1].partition(":")
                    where[fields[9]] = _address(address), int(port, 16)
    found = set()
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            kind = _kind(command)
            for fd in os.listdir(f"/proc/{entry}/fd") if kind else ():
                with suppress(OSError):
                    inode = os.readlink(f"/proc/{entry}/fd/{fd}").removeprefix("socket:[").removesuffix("]")
                    if inode in where:
                        found.add(Listening(*where[inode], kind))
    return tuple(sorted(found, key=lambda sock: (sock.process, sock.port, sock.address)))


def _kind(command: str) -> str:
    """What process of Ray's this is, by its command line; "" for none."""
    if command.startswith("ray::"):
        return "agent" if "Agent" in command.split(" ")[0] else "worker"
    for part, kind in (
        ("/gcs_server ", "GCS"),
        ("/raylet ", "raylet"),
        ("ray.util.client.server", "client server"),
        ("ray/dashboard/dashboard.py", "dashboard"),
        ("ray-dashboard-", "dashboard"),
        ("ray/autoscaler/_private/monitor.py", "monitor"),
    ):
        if part in command:
            return kind
    return ""


def _address(text: str) -> str:
    """An address of /proc/net/tcp: 32-bit words in the host's order."""
    words = [int(text[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(text), 8)]
    data = b"".join(words)
    if len(data) == 4:
        return ".".join(map(str, data))
    if data[:12] == bytes(10) + b"\xff\xff":
        return ".".join(map(str, data[12:]))
    if not any(data):
        return "::"
    return "::1" if data == bytes(15) + b"\1" else data.hex(":", 2)
