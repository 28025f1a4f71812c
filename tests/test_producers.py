"""Images by their real producers: one guest in every format that QEMU and makedumpfile write, cores of processes.

Known answer: whatever the format, the guest's pages by address are those of its RAM, which is a file of this host.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import signal
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import ksmdist
from ksmdist import images
from ksmdist.columns import values
from ksmdist.images import Hole, ImageInfo

from . import conftest
from .conftest import PAGE
from .producers.guest import CACHE, Guest, emulators, pages_written
from .targets import NOHUGE, Start, linux

pytestmark = pytest.mark.producers

INSTALL = "tests/producers/install.sh"
SEED, MIB = 6, 96
ROM, ROM_PAGES = 0xFFFC0000, 64
"""QEMU's BIOS is in its dumps as 256 KiB below 4 GiB."""


def unavailable(reason: str) -> None:
    """Skip a test that needs real producers; fail it where KSMDIST_FORCE_PRODUCERS is 1."""
    conftest.unavailable(f"{reason}: run {INSTALL}", "KSMDIST_FORCE_PRODUCERS")


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            unavailable(f"{program} is not installed")


@dataclass(frozen=True)
class Read:
    """An image as read: numbers of its pages, int64[n], and their bytes, uint8[n, PAGE]."""

    info: ImageInfo
    page: np.ndarray
    content: np.ndarray

    def of_ram(self) -> tuple[np.ndarray, np.ndarray]:
        inside = self.page < MIB << 8
        return self.page[inside], self.content[inside]


def read(path: Path) -> Read:
    image = images.open_image(str(path), PAGE)
    try:
        assert image.holes == ()
        pages, contents = [], []
        for item in image.batches(0, image.info.pages):
            assert not isinstance(item, Hole), item
            pages.append((values(item.column("address")) // PAGE).astype(np.int64))
            contents.append(np.frombuffer(b"".join(item.column("content").to_pylist()), np.uint8).reshape(-1, PAGE))
        return Read(image.info, np.concatenate(pages), np.concatenate(contents))
    finally:
        image.close()


@dataclass(frozen=True)
class Taken:
    """A guest's RAM, uint8[pages, PAGE], and images of it by name of the format."""

    ram: np.ndarray
    files: dict[str, Path]
    folder: Path

    @property
    def zero(self) -> np.ndarray:
        """bool: which pages of RAM are zero."""
        return np.asarray(~self.ram.any(axis=1))

    def differences(self, found: Read) -> dict[str, int]:
        """Pages of an image that are not those of RAM; what RAM has besides. Those that are not 0."""
        page, content = found.of_ram()
        extra = found.page[found.page >= len(self.ram)]
        rom = np.arange(ROM // PAGE, ROM // PAGE + ROM_PAGES)
        counted = {
            "wrong": int((content != self.ram[page]).any(axis=1).sum()),
            "missing": len(self.ram) - len(page),
            "beyond": len(np.setdiff1d(extra, rom)),
        }
        return {name: count for name, count in counted.items() if count}


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Taken]]:
    """A guest of a QEMU of emulators(), by name, stopped and taken in every format, once."""
    found: dict[str, Taken] = {}

    def taken(name: str) -> Taken:
        if name not in found:
            found[name] = take(emulators()[name], tmp_path_factory.mktemp(name))
        return found[name]

    yield taken
    for guest in found.values():  # 600 MB each
        shutil.rmtree(guest.folder)


def take(command: Sequence[str], folder: Path) -> Taken:
    needs("busybox")
    for name in ("vmlinuz", "qemu_fw_cfg.ko"):
        if not (CACHE / name).exists():
            unavailable(f"{CACHE / name} is not there")
    with Guest(command, folder, SEED, MIB) as guest:
        files = {format: guest.dump(format) for format in guest.dump_formats()}
        files["elf-paging"] = guest.dump("elf", paging=True)
        files["pmemsave"] = guest.pmemsave()
        files |= {f"migrate-{way}": guest.migrate(way) for way in guest.migrations()}
    files["ram"] = guest.ram
    ram = np.fromfile(guest.ram, np.uint8).reshape(-1, PAGE)
    ram.setflags(write=False)
    return Taken(ram, files, folder)


@pytest.fixture(params=["qemu", "qemu-backports"])
def each(request: pytest.FixtureRequest, guests: Callable[[str], Taken]) -> Taken:
    """A guest of each QEMU."""
    if request.param not in emulators():
        if request.param != "qemu" and platform.freedesktop_os_release().get("VERSION_CODENAME") != "bookworm":
            pytest.skip("the QEMU that is installed is the newest here")
        unavailable(f"{request.param} is not there")
    return guests(request.param)


@pytest.fixture
def taken(guests: Callable[[str], Taken]) -> Taken:
    """A guest of the newest QEMU."""
    if not emulators():
        unavailable("QEMU is not installed")
    return guests(list(emulators())[-1])


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied afterwards: pytest keeps its own, and these files are large."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_a_guest_is_the_same_in_every_format_of_qemu(each: Taken) -> None:
    found = {name: read(path) for name, path in each.files.items()}
    differences = {name: each.differences(one) for name, one in found.items()}
    # Pages that no page table maps are not in the one, pages that QEMU has not touched not in the other.
    for name in ("elf-paging", "ram"):
        missing = differences[name].pop("missing", 0)
        page, _ = found[name].of_ram()
        assert missing < len(each.ram) // 10
        if name == "ram":
            assert np.setdiff1d(np.flatnonzero(~each.zero), page).size == 0
    assert differences == {name: {} for name in each.files}
    assert {"elf", "kdump-zlib", "migrate-exec"} <= set(found)
    assert all(not one.info.filter_level for name, one in found.items() if name != "elf-paging")
    assert all(one.info.pages_excluded == 0 for one in found.values())


def test_qemus_dumps_have_64_pages_of_bios_besides(each: Taken) -> None:
    for name, path in each.files.items():
        if name.startswith(("elf", "kdump")) and name != "elf-paging":
            found = read(path)
            assert found.page[found.page >= len(each.ram)].tolist() == list(range(ROM // PAGE, (1 << 32) // PAGE))


def test_what_the_guest_wrote_is_found(taken: Taken) -> None:
    written = Counter(pages_written(SEED))
    found = Counter(page.tobytes() for page in read(taken.files["kdump-zlib"]).content)
    # Twice each, in its initramfs and in its tmpfs; and where a file was copied last.
    short = {content: count for content, count in written.items() if found[content] < 2 * count}
    assert not short


def test_runs_on_any_format_count_the_same(taken: Taken, scratch: Path) -> None:
    counted = {}
    for name in ("elf", "kdump-zlib"):
        counted[name] = ksmdist.run([taken.files[name]], scratch / name, engine="inline").summary["counters"]
    assert counted["elf"] == counted["kdump-zlib"]
    whole = ksmdist.run([taken.files["pmemsave"]], scratch / "pmemsave", engine="inline").summary
    copies = Counter(page.tobytes() for page in taken.ram[~taken.zero])
    assert whole["contents"]["distinct"] == len(copies)
    assert whole["contents"]["shared"] == sum(count > 1 for count in copies.values())
    assert whole["pages"]["zero"] == int(taken.zero.sum())


def plain_elf(elf: Path, to: Path, rom: bool = True) -> Path:
    """QEMU's ELF as makedumpfile takes it: program headers at 64, no section headers; rom: with the BIOS's segment."""
    data = bytearray(elf.read_bytes())
    (phoff,) = struct.unpack_from("<Q", data, 32)
    (phnum,) = struct.unpack_from("<H", data, 56)
    headers = [bytes(data[phoff + 56 * number : phoff + 56 * (number + 1)]) for number in range(phnum)]
    if not rom:
        headers = [header for header in headers if struct.unpack_from("<Q", header, 24)[0] != ROM]
    data[64 : 64 + 56 * len(headers)] = b"".join(headers)
    struct.pack_into("<QQ", data, 32, 64, 0)
    struct.pack_into("<HHHH", data, 56, len(headers), 0, 0, 0)
    to.write_bytes(data)
    return to


def makedumpfile(*arguments: str | Path) -> None:
    done = subprocess.run(["makedumpfile", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def compressions() -> list[str]:
    """Options of makedumpfile for how pages are compressed, those that it was built with."""
    needs("makedumpfile")
    said = subprocess.run(["makedumpfile", "-v"], capture_output=True, text=True).stdout
    named = {"lzo": "-l", "snappy": "-p", "zstd": "-z"}
    return ["-c", *(option for name, option in named.items() if f"{name}\tenabled" in said)]


def test_makedumpfile_compresses(taken: Taken, scratch: Path) -> None:
    options = [[], *([option] for option in compressions())]
    vmcore = plain_elf(taken.files["elf"], scratch / "vmcore")
    for number, option in enumerate(options):
        dump = scratch / f"{number}.kdump"
        makedumpfile(*option, "-d", "0", vmcore, dump)
        found = read(dump)
        assert (option, taken.differences(found)) == (option, {})
        assert found.info.filter_level == ""
        assert found.info.pages_excluded == 0


def test_makedumpfile_marks_zero_pages(taken: Taken, scratch: Path) -> None:
    needs("makedumpfile")
    vmcore = plain_elf(taken.files["elf"], scratch / "vmcore", rom=False)
    makedumpfile("-c", "-d", "1", vmcore, scratch / "kdump")
    found = read(scratch / "kdump")
    assert taken.differences(found) == {}
    assert (found.info.filter_level, found.info.pages_excluded) == ("", 0)


def test_makedumpfile_leaves_most_out(taken: Taken, scratch: Path) -> None:
    needs("makedumpfile")
    vmcore = plain_elf(taken.files["elf"], scratch / "vmcore", rom=False)
    makedumpfile("-c", "-d", "31", vmcore, scratch / "kdump")
    found = read(scratch / "kdump")
    differences = taken.differences(found)
    assert differences.keys() == {"missing"}
    assert found.info.pages_excluded == found.info.pages_absent == differences["missing"]
    assert 1000 < len(found.page) < 20_000
    assert all(word in found.info.filter_level for word in ("-d 31", "cache", "user", "free"))


# In a block of 1 GiB all pages are: the other parts have none.
@pytest.mark.parametrize(("block_mib", "level"), [("8", "1"), ("8", "31"), ("1024", "0")])
def test_makedumpfile_splits(block_mib: str, level: str, taken: Taken, scratch: Path) -> None:
    needs("makedumpfile")
    vmcore = plain_elf(taken.files["elf"], scratch / "vmcore", rom=False)
    parts = [scratch / f"part-{number}" for number in range(3)]
    makedumpfile("--split", "--splitblock-size", block_mib, "-c", "-d", level, vmcore, *parts)
    first, *others = (read(part) for part in parts)
    for other in others:  # whichever is named, it is the whole dump
        assert np.array_equal(other.page, first.page)
        assert np.array_equal(other.content, first.content)
    missing = {"missing": first.info.pages_excluded} if level == "31" else {}
    assert taken.differences(first) == missing


def test_flattened_dumps(taken: Taken, scratch: Path) -> None:
    needs("makedumpfile")
    with open(taken.files["kdump-zlib"], "rb") as flat:  # QEMU's is flattened
        subprocess.run(["makedumpfile", "-R", scratch / "plain"], stdin=flat, check=True, capture_output=True)
    assert taken.differences(read(scratch / "plain")) == {}
    vmcore = plain_elf(taken.files["elf"], scratch / "vmcore")
    with open(scratch / "flat", "wb") as flat:
        subprocess.run(["makedumpfile", "-F", "-c", "-d", "0", vmcore], stdout=flat, check=True, stderr=subprocess.PIPE)
    assert taken.differences(read(scratch / "flat")) == {}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        *(("elf", command) for command in ("gzip -1", "zstd -q -1", "xz -0 -T0", "lz4 -q")),
        *((name, "zstd -q -1") for name in ("pmemsave", "kdump-zlib", "migrate-exec")),
    ],
)
def test_compressed_images(name: str, command: str, taken: Taken, scratch: Path) -> None:
    program, *options = command.split()
    needs(program)
    with open(taken.files[name], "rb") as source, open(scratch / "packed", "wb") as sink:
        subprocess.run([program, *options, "-c"], stdin=source, stdout=sink, check=True)
    assert taken.differences(read(scratch / "packed")) == {}


LAYOUT = f"""
m = anon("written", 40, {NOHUGE})
for page in range(32): write(m, page, 7 + page)
write(m, 32, 0, 8)
m = anon("touched", 16, {NOHUGE}); touch(m, 0, 16)
anon("untouched", 64, {NOHUGE})
"""


def laid_out(path: Path, told: dict[str, int]) -> dict[str, list[bytes | None]]:
    """Pages of the mappings of LAYOUT in an image, None where it has none."""
    image = images.open_image(str(path), PAGE)
    assert image.info.kind == "process"
    assert image.holes == ()
    found: dict[int, bytes] = {}
    for item in image.batches(0, image.info.pages):
        assert not isinstance(item, Hole), item
        found.update(zip(values(item.column("address")).tolist(), item.column("content").to_pylist(), strict=True))
    image.close()
    pages = {"written": 40, "touched": 16, "untouched": 64}
    return {name: [found.get(told[name] + n * PAGE) for n in range(count)] for name, count in pages.items()}


WRITTEN = [struct.pack("<Q", 7 + page) * (PAGE // 8) for page in range(32)] + [bytes(PAGE)] * 8


@linux
def test_gcore_writes_zeros_where_nothing_was_touched(start: Start, scratch: Path) -> None:
    """T2: which of its zero pages are memory, its file does not tell."""
    needs("gcore")
    target = start(LAYOUT)
    done = subprocess.run(
        ["gcore", "-o", str(scratch / "core"), str(target.pid)], capture_output=True, text=True, check=False
    )
    path = scratch / f"core.{target.pid}"
    if not path.exists() and "ptrace" in done.stderr:
        unavailable("this process may not be traced")
    zeros = bytes(PAGE)
    assert laid_out(path, target.told) == {"written": WRITTEN, "touched": [zeros] * 16, "untouched": [zeros] * 64}
    image = images.open_image(str(path), PAGE)
    assert image.info.producer == "gcore"
    assert "never touched is in it as zeros" in image.info.filter_level
    image.close()


@pytest.fixture
def kernel_core(start: Start, scratch: Path) -> tuple[Path, dict[str, int]]:
    """A core that the kernel wrote of LAYOUT, and where its mappings were."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith("|") or "/" in pattern:
        unavailable(f"core_pattern is {pattern!r}: cores do not go to the process's own folder")

    def unlimited() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    target = start(LAYOUT, cwd=scratch, preexec_fn=unlimited)
    os.kill(target.pid, signal.SIGABRT)
    target.process.wait(20)
    [path] = scratch.glob("*core*")
    return path, target.told


@linux
def test_a_core_of_the_kernel_has_what_was_touched(kernel_core: tuple[Path, dict[str, int]], scratch: Path) -> None:
    """T2: its holes are pages that were never written, the zero pages in it are zero pages."""
    path, told = kernel_core
    assert laid_out(path, told) == {"written": WRITTEN, "touched": [None] * 16, "untouched": [None] * 64}
    needs("zstd")
    subprocess.run(["zstd", "-q", str(path), "-o", str(scratch / "packed")], check=True)  # as systemd-coredump keeps it
    zeros = bytes(PAGE)
    assert "never touched is in it as zeros" in images.open_image(str(scratch / "packed")).info.filter_level
    found = laid_out(scratch / "packed", told)  # with no holes any more
    assert found == {"written": WRITTEN, "touched": [zeros] * 16, "untouched": [zeros] * 64}
