"""A small Linux guest in QEMU, stopped, and its memory in every format that this QEMU writes."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

__all__ = ["CACHE", "Guest", "emulators", "pages_written"]

PAGE = 4096
CACHE = Path(os.environ.get("KSMDIST_PRODUCERS") or Path.home() / ".cache/ksmdist/producers")
"""Where install.sh puts what it does not install."""

_BOOT_S = 60.0  # it takes 2.5
_INIT = b"""#!/bin/busybox sh
/bin/busybox mkdir /tmp
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox cp /pages /tmp/pages
/bin/busybox insmod /qemu_fw_cfg.ko
echo READY
exec /bin/busybox sleep 1000000
"""


def emulators() -> dict[str, list[str]]:
    """The QEMUs there are: name -> command."""
    found = {}
    installed = shutil.which("qemu-system-x86_64")
    if installed:
        found["qemu"] = [installed]
    unpacked = CACHE / "qemu-backports/usr"
    if (unpacked / "bin/qemu-system-x86_64").exists():
        firmware = [option for name in ("qemu", "seabios") for option in ("-L", str(unpacked / "share" / name))]
        found["qemu-backports"] = [str(unpacked / "bin/qemu-system-x86_64"), *firmware]
    return found


def pages_written(seed: int) -> list[bytes]:
    """The pages that the guest writes to its tmpfs: 512 zero ones, 16 contents 16 times each, 512 of their own."""
    rng = random.Random(seed)
    repeated = [rng.randbytes(PAGE) for _ in range(16)] * 16
    pages = [bytes(PAGE)] * 512 + repeated + [rng.randbytes(PAGE) for _ in range(512)]
    rng.shuffle(pages)
    return pages


class Guest:
    """A guest that has written its pages and is stopped: nothing in its memory changes any more.

    Its RAM is the file `ram` of `folder`, shared with QEMU, from guest-physical address 0 on.
    """

    def __init__(self, command: Sequence[str], folder: Path, seed: int, mib: int) -> None:
        self.folder, self.mib = folder, mib
        self.ram = folder / "ram"
        self._command = [
            *command,
            *("-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-nic", "none"),
            *("-m", f"{mib}M", "-machine", "pc,memory-backend=pc.ram", "-device", "vmcoreinfo"),
            *("-kernel", str(CACHE / "vmlinuz"), "-initrd", str(folder / "initramfs")),
            *("-append", "console=ttyS0 quiet panic=-1", "-serial", f"file:{folder / 'serial'}", "-qmp", "stdio"),
        ]
        self._migrated: Path | None = None
        (folder / "initramfs").write_bytes(_initramfs(seed))
        self._process = self._started(self.ram)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _started(self, ram: Path, *options: str) -> subprocess.Popen[str]:
        backend = f"memory-backend-file,id=pc.ram,size={self.mib}M,mem-path={ram},share=on"
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*self._command, "-object", backend, *options], stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _greeted(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self.ask("qmp_capabilities")

    def _wait(self) -> None:
        """Until it has written its pages; then stop it."""
        self._greeted()
        serial = self.folder / "serial"
        limit = time.monotonic() + _BOOT_S
        while b"READY" not in serial.read_bytes():
            if time.monotonic() > limit:
                raise TimeoutError(f"no guest after {_BOOT_S} s: {serial.read_bytes()[-500:]!r}")
            time.sleep(0.05)
        self.ask("stop")

    def ask(self, command: str, **arguments: Any) -> Any:
        """What QEMU returns to a QMP command. Raises RuntimeError if it refuses."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        assert self._process.stderr is not None
        raise RuntimeError(f"QEMU has ended: {self._process.stderr.read()[-500:]}")

    def dump_formats(self) -> list[str]:
        """What dump-guest-memory can write here; win-dmp is of Windows guests."""
        known = self.ask("query-dump-guest-memory-capability")["formats"]
        return [format for format in known if format != "win-dmp"]

    def dump(self, format: str, paging: bool = False) -> Path:
        """dump-guest-memory; paging: by its page tables (virtual addresses too)."""
        path = self.folder / (f"{format}-paging" if paging else format)
        self.ask("dump-guest-memory", paging=paging, protocol=f"file:{path}", format=format)
        return path

    def pmemsave(self) -> Path:
        """Guest-physical memory byte for byte."""
        path = self.folder / "pmemsave"
        self.ask("pmemsave", val=0, size=self.mib << 20, filename=str(path))
        return path

    def migrations(self) -> list[str]:
        """Ways to migrate to a file here: exec; file, mapped-ram."""
        known = {each["capability"] for each in self.ask("query-migrate-capabilities")}
        # mapped-ram came with QEMU 9.0, file: with 8.2.
        return ["exec", "file", "mapped-ram"] if "mapped-ram" in known else ["exec"]

    def migrate(self, way: str) -> Path:
        """Migrate to a file; way: of migrations(). What has migrated cannot again: then from what it wrote."""
        path = self.folder / f"migrate-{way}"
        if self._migrated is not None:
            self.close()
            self._process = self._started(self.folder / "ram-again", "-S", "-incoming", f"exec:cat {self._migrated}")
            self._greeted()
            while self.ask("query-status")["status"] == "inmigrate":
                time.sleep(0.02)
        if way == "mapped-ram":
            self.ask("migrate-set-capabilities", capabilities=[{"capability": way, "state": True}])
        self.ask("migrate", uri=f"exec:cat > {path}" if way == "exec" else f"file:{path}")
        while (state := self.ask("query-migrate"))["status"] != "completed":
            if state["status"] in ("failed", "cancelled"):
                raise RuntimeError(f"migration {way}: {state}")
            time.sleep(0.02)
        if way != "mapped-ram":
            self._migrated = path
        return path


def _initramfs(seed: int) -> bytes:
    busybox = shutil.which("busybox")
    assert busybox is not None
    program, folder = stat.S_IFREG | 0o755, stat.S_IFDIR | 0o755
    return _newc(
        {
            "bin": (folder, b""),
            "dev": (folder, b""),
            "bin/busybox": (program, Path(busybox).read_bytes()),
            "init": (program, _INIT),
            "pages": (program, b"".join(pages_written(seed))),
            "qemu_fw_cfg.ko": (program, (CACHE / "qemu_fw_cfg.ko").read_bytes()),  # or no VMCOREINFO in dumps
            "TRAILER!!!": (0, b""),
        }
    )


def _newc(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive of files, name -> (mode, bytes); Documentation/driver-api/early-userspace/buffer-format.rst."""
    archive = bytearray()
    for number, (name, (mode, data)) in enumerate(files.items(), 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
