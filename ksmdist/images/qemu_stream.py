"""QEMU's migration stream up to the end of its RAM: which blocks there are, and where in the file each page lies.

Rules: QEMU, migration/savevm.c (sections, the configuration), migration/vmstate.c (subsections), migration/ram.c
(ram_save_setup, ram_load_precopy, parse_ramblock), docs/devel/migration/mapped-ram.rst; 2.3 to 10. All numbers are
big-endian, bitmaps little-endian words. What follows the RAM, the state of devices, is not read.

Raises ImageError: a stream that is not one, that ends before its blocks are named, or that has what only QEMU can
read: sections of live devices before the RAM's end, records that refer to earlier ones (XBZRLE) or are compressed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from ksmdist.errors import ImageError, SettingsError
from ksmdist.images.files import ImageFile
from ksmdist.images.qemu_blocks import RamBlock
from ksmdist.images.qemu_bytes import Ended, StreamBytes
from ksmdist.images.qemu_records import CONTINUE, PAGE, ZERO, PageRecords
from ksmdist.images.scattered import PageRuns, concatenated

__all__ = ["MAGIC", "MappedBlock", "RamStream", "read_stream"]

MAGIC = b"QEVM"
"""The first bytes of a stream."""

_VERSION, _RAM_VERSION, _MAPPED_VERSION = 3, 4, 1
_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _VMDESCRIPTION, _CONFIGURATION, _COMMAND = range(9)
_FOOTER = 0x7E
_MEM_SIZE, _EOS, _XBZRLE, _HOOK, _COMPRESS_PAGE, _MULTIFD_FLUSH = 0x04, 0x10, 0x40, 0x80, 0x100, 0x200
_POSTCOPY = range(3, 10)  # commands MIG_CMD_POSTCOPY_ADVISE to MIG_CMD_RECV_BITMAP
_SWITCH_OFF = {_XBZRLE: "xbzrle", _COMPRESS_PAGE: "compress", _HOOK: "rdma-pin-all", _MULTIFD_FLUSH: "multifd"}
_MOST_BLOCKS = 4096  # a guest has its RAM, DIMMs (256 at most) and a few of each device
_MOST_NAME = 256
_MOST_CAPABILITIES = 256
_MOST_BYTES = 1 << 62  # of a file
_MOST_RAM = 1 << 46  # what x86-64 addresses with four levels of tables; a sparse file may claim any number
_LONGEST = 8 + 1 + 255  # a record's header
_MOST_PARTS = 1 << 20  # of the RAM section, one each 50 ms (MAX_WAIT), and commands between them


class MappedBlock(NamedTuple):
    """Where a mapped-ram file has the pages of a block, and the bitmap that says which; both 0: they are not in it."""

    bitmap: int
    pages: int


@dataclass
class RamStream:
    """What a stream says of RAM.

    ended: whether its RAM section has; left: bytes of blocks that it does not come to name; records: pages that lie
    in the stream, PageRuns.page from RamBlock.key of their block on; mapped: of each block, where they do not.
    """

    machine: str = ""
    capabilities: tuple[str, ...] = ()
    page_size: int = 4096
    blocks: list[RamBlock] = field(default_factory=list)
    mapped: list[MappedBlock] = field(default_factory=list)
    ended: bool = False
    left: int = 0
    records: PageRuns = field(default_factory=lambda: concatenated([]))


def read_stream(file: ImageFile, start: int, page_size: int) -> RamStream:
    """Read the stream that begins at byte `start` of a file, up to the end of its RAM.

    Raises ImageError as above, SettingsError where its pages have another size.
    """
    return _Reader(file, start, page_size).read()


class _Reader:
    def __init__(self, file: ImageFile, start: int, page_size: int) -> None:
        self._file = file
        self._page_size = page_size
        self._bytes = StreamBytes(file, start)
        self._found = RamStream()
        self._section: int | None = None  # id of the RAM's
        self._pages: PageRecords | None = None  # once the blocks are known
        self._parts = 0

    def read(self) -> RamStream:
        found = self._found
        try:
            self._container()
        except Ended:
            if self._pages is None and not found.mapped:
                raise self._broken("truncated: it ends before it names the blocks of RAM that are in it") from None
        finally:
            self._bytes.close()
        if self._pages is not None:
            found.records = self._pages.runs()
        return found

    def _broken(self, what: str) -> ImageError:
        return ImageError(what, self._file.path, "copy it again, or migrate the guest to a file again")

    def _only_qemu(self, what: str, hint: str) -> ImageError:
        return ImageError(f"has {what}", self._file.path, hint)

    def _count(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise self._broken(f"has more than {_MOST_PARTS} parts, at byte {self._bytes.at}")

    def _container(self) -> None:
        stream = self._bytes
        head = stream.take(8)
        if not head.startswith(MAGIC):
            raise self._broken("is no migration stream: it does not begin with QEVM")
        version = int.from_bytes(head[4:], "big")
        if version != _VERSION:
            raise self._broken(f"is a migration stream of version {version}, not {_VERSION}")
        kind = stream.number(1)
        if kind == _CONFIGURATION:
            self._configuration()
            kind = stream.number(1)
        if self._found.page_size != self._page_size:
            raise SettingsError(
                f"has pages of {self._found.page_size} bytes, this run has {self._page_size}",
                self._file.path,
                f"run it with --page-size {self._found.page_size}",
            )
        while not self._last(kind):
            if stream.peek() == _FOOTER:
                stream.skip(5)
            kind = stream.number(1)

    def _last(self, kind: int) -> bool:
        """Read one section; whether RAM ends with it, or before it."""
        stream, at = self._bytes, self._bytes.at - 1
        self._count()
        if kind == _FULL and self._section is not None:
            # A device's state comes after RAM, which in a background-snapshot has no other end; bitmaps do.
            self._found.ended = not self._found.mapped
            return True
        if kind in (_START, _FULL):
            section, name = stream.number(4), stream.text()
            _, version = stream.number(4), stream.number(4)
            if kind == _FULL or name != b"ram":
                raise self._only_qemu(
                    f"state of {_device(name)} before the end of its RAM, at byte {at}, whose length only QEMU knows",
                    "migrate without that device, or its capability; or dump the guest as ELF instead",
                )
            if version != _RAM_VERSION or self._section is not None:
                raise self._broken(f"has a RAM section of version {version} at byte {at}, or a second one")
            self._section = section
            self._records()
        elif kind in (_PART, _END):
            section = stream.number(4)
            if section != self._section:
                raise self._broken(f"has section {section} at byte {at}, which has not begun")
            self._records()
            self._found.ended = kind == _END
        elif kind == _COMMAND:
            command, nbytes = stream.number(2), stream.number(2)
            if command in _POSTCOPY and nbytes:  # ADVISE of dirty-bitmaps alone has no bytes
                raise self._only_qemu(
                    f"a command of postcopy ({command}) at byte {at}, and only QEMU can read what follows",
                    "switch the capability postcopy-ram off, and migrate to a file again",
                )
            stream.skip(nbytes)
        elif kind in (_EOF, _VMDESCRIPTION):
            if self._section is None:
                raise self._broken("ends with no RAM in it")
            return True
        else:
            raise self._broken(f"has a section of the unknown type {kind} at byte {at}")
        return self._found.ended

    def _configuration(self) -> None:
        """vmstate_configuration, migration/savevm.c: the machine's name, and subsections."""
        stream, found = self._bytes, self._found
        nbytes = stream.number(4)
        if nbytes > _MOST_NAME:
            raise self._broken(f"has a machine name of {nbytes} bytes")
        found.machine = _shown(stream.take(nbytes))
        while stream.peek() == _SUBSECTION:
            stream.skip(1)
            name, _ = stream.text(), stream.number(4)
            if name == b"configuration/capabilities":
                count = stream.number(4)
                if count > _MOST_CAPABILITIES:
                    raise self._broken(f"has {count} capabilities")
                found.capabilities = tuple(_shown(stream.text()) for _ in range(count))
            elif name == b"configuration/target-page-bits":
                bits = stream.number(4)
                if not 10 <= bits <= 16:  # TARGET_PAGE_BITS of all targets
                    raise self._broken(f"has pages of 2**{bits} bytes")
                found.page_size = 1 << bits
            elif name == b"configuration/uuid":
                stream.skip(16)
            else:
                raise self._only_qemu(
                    f"a configuration that is not known here: {_shown(name)}", "dump the guest as ELF instead"
                )

    def _records(self) -> None:
        """Records up to the end of this part of the RAM section."""
        stream, found = self._bytes, self._found
        size = found.page_size
        while True:
            while self._pages is not None:
                at = stream.at
                stream.at = self._pages.walk(stream.window(_LONGEST + size), at)
                if stream.at == at:
                    break
            self._count()
            at = stream.at
            head = stream.number(8)
            flags, offset = head & (size - 1), head & -size
            if flags == _EOS:
                return
            if flags == _MEM_SIZE:
                self._list(offset)
            elif flags & ~CONTINUE in (ZERO, PAGE) and self._pages is not None:
                raise Ended  # a record that is not whole
            elif flags & (_XBZRLE | _COMPRESS_PAGE | _HOOK) or (flags == _MULTIFD_FLUSH and not found.mapped):
                capability = next(name for flag, name in _SWITCH_OFF.items() if flags & flag)
                raise self._only_qemu(
                    f"a record at byte {at} that only QEMU can read: it was migrated with the capability {capability}",
                    f"switch {capability} off (migrate_set_capability {capability} off), and migrate to a file again",
                )
            elif flags != _MULTIFD_FLUSH:
                raise self._broken(f"has a record with the unknown flags {flags:#x} at byte {at}")

    def _list(self, total: int) -> None:
        """The record MEM_SIZE: the blocks. ram_save_setup, migration/ram.c."""
        stream, found = self._bytes, self._found
        if found.blocks or total > _MOST_RAM:
            raise self._broken(f"lists {total} bytes of RAM at byte {stream.at}, or blocks a second time")
        names: dict[bytes, RamBlock] = {}
        found.left, key = total, 0
        while found.left:
            at, name, nbytes = stream.at, stream.text(), stream.number(8)
            if not name or name in names or len(names) == _MOST_BLOCKS:
                raise self._broken(f"has a list of blocks that cannot be, at {_shown(name)!r}, byte {at}")
            if nbytes > found.left or nbytes % found.page_size:
                raise self._broken(f"has a block {_shown(name)!r} of {nbytes} bytes at byte {at}, of {found.left}")
            if "x-ignore-shared" in found.capabilities:
                stream.skip(8)  # where its region lies in its container: no guest-physical address
            if "mapped-ram" in found.capabilities:
                found.mapped.append(self._mapped(name, nbytes))
            names[name] = RamBlock(_shown(name), nbytes, key)
            found.blocks.append(names[name])
            found.left -= nbytes
            key += nbytes // found.page_size + 1  # one more: runs do not go on into the next block
        self._pages = PageRecords(self._file.path, found.page_size, names)

    def _mapped(self, name: bytes, nbytes: int) -> MappedBlock:
        """The header of mapped-ram; the stream goes on behind the block's pages. mapped_ram_setup_ramblock."""
        stream, size = self._bytes, self._found.page_size
        version, page_size = stream.number(4), stream.number(8)
        bitmap, pages = stream.number(8), stream.number(8)
        if version != _MAPPED_VERSION or page_size != size:
            raise self._broken(
                f"has a block {_shown(name)!r} of mapped-ram version {version} and pages of {page_size} bytes, "
                f"where the target's have {size}"
            )
        if bitmap == pages == 0:  # a block that is shared, and left out with x-ignore-shared
            return MappedBlock(0, 0)
        bitmap_bytes = -(-(nbytes // size) // 64) * 8
        if not stream.at <= bitmap <= pages - bitmap_bytes or pages + nbytes >= _MOST_BYTES:
            raise self._broken(f"has a block {_shown(name)!r} whose bitmap or pages lie over something else")
        stream.at = pages + nbytes
        return MappedBlock(bitmap, pages)


def _device(name: bytes) -> str:
    """A device's name between pages, for a message: where records are damaged it may be of a page, and is not shown."""
    plain = re.fullmatch(rb"[\w./:@,-]{1,64}", name)
    return repr(_shown(name)) if plain else f"a device with a name of {len(name)} bytes"


def _shown(name: bytes) -> str:
    """A name as people can read it, whatever is in it; other bytes, other text."""
    return name.decode("latin-1").encode("unicode_escape").decode("ascii")
