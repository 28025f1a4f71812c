"""QEMU's migration streams and libvirt's saved domains, as they are written, of any pages.

Written from QEMU's migration/savevm.c, vmstate.c, ram.c and docs/devel/migration/mapped-ram.rst, and libvirt's
src/qemu/qemu_saveimage.h; streams of QEMU 7.2 and 10.0 were compared field by field.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PAGE = 4096
MACHINE = "pc-i440fx-7.2"
XML = b"<domain type='kvm'>\n  <name>web-1</name>\n  <uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>\n</domain>\n"

ZERO_FLAG, MEM_SIZE, PAGE_FLAG, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
XBZRLE, HOOK, COMPRESS_PAGE, MULTIFD_FLUSH = 0x40, 0x80, 0x100, 0x200
_START, _PART, _END, _FULL, _SUBSECTION, _CONFIGURATION, _COMMAND, _FOOTER = 1, 2, 3, 4, 5, 7, 8, 0x7E
_RAM = 2  # id of its section

Ram = Mapping[str, Sequence[bytes]]
"""Pages of each block, by its name."""


@dataclass
class Stream:
    """A stream that grows. start: bytes in the file before it; fields: where numbers lie in it, (byte, nbytes)."""

    start: int = 0
    footers: bool = True
    data: bytearray = field(default_factory=bytearray)
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)
    block: str = ""  # of the last record

    def number(self, name: str, nbytes: int, value: int) -> None:
        self.fields[name] = (len(self.data), nbytes)
        self.data += value.to_bytes(nbytes, "big")

    def text(self, value: str) -> None:
        self.number(f"length of {value}", 1, len(value))
        self.data += value.encode("latin-1")

    def begin(self, machine: str = MACHINE, capabilities: Sequence[str] = (), bits: int = 0) -> None:
        """The header, the configuration, and the RAM section's first part."""
        self.data += b"QEVM"
        self.number("version", 4, 3)
        if machine:
            self.number("configuration", 1, _CONFIGURATION)
            self.number("machine", 4, len(machine))
            self.data += machine.encode()
            if bits:
                self._subsection("target-page-bits")
                self.number("bits", 4, bits)
            if capabilities:
                self._subsection("capabilities")
                self.number("capabilities", 4, len(capabilities))
                for capability in capabilities:
                    self.text(capability)
            self._subsection("uuid")
            self.data += bytes(16)
        self.section(_START)

    def _subsection(self, name: str) -> None:
        self.number(f"subsection {name}", 1, _SUBSECTION)
        self.text(f"configuration/{name}")
        self.number(f"version of {name}", 4, 1)

    def section(self, kind: int, name: str = "ram") -> None:
        self.number(f"section {kind}", 1, kind)
        self.number(f"id {kind}", 4, _RAM)
        if kind in (_START, _FULL):
            self.text(name)
            self.number("instance", 4, 0)
            self.number("version of ram", 4, 4)

    def end_section(self) -> None:
        self.number("end", 8, EOS)
        if self.footers:
            self.number("footer", 1, _FOOTER)
            self.number("footer id", 4, _RAM)

    def command(self, number: int, payload: bytes = b"") -> None:
        self.number("command", 1, _COMMAND)
        self.data += struct.pack(">HH", number, len(payload)) + payload

    def total(self, ram: Ram, page_size: int = PAGE) -> None:
        self.number("total", 8, sum(map(len, ram.values())) * page_size | MEM_SIZE)

    def listed(self, ram: Ram, extra: bytes = b"", page_size: int = PAGE) -> None:
        """The list of blocks; extra: what capabilities add to each."""
        self.total(ram, page_size)
        for name, pages in ram.items():
            self.text(name)
            self.number(f"bytes of {name}", 8, len(pages) * page_size)
            self.data += extra

    def page(self, name: str, number: int, content: bytes) -> None:
        """A record: of the byte it is full of, or of its bytes."""
        filled = content == content[:1] * len(content)
        flags = ZERO_FLAG if filled else PAGE_FLAG
        self.number("record", 8, number * len(content) | flags | (CONTINUE if name == self.block else 0))
        if name != self.block:
            self.text(name)
            self.block = name
        self.data += content[:1] if filled else content

    def mapped(self, name: str, pages: Sequence[bytes], align: int, extra: bytes = b"") -> None:
        """A block of mapped-ram: its header, bitmap and pages."""
        self.text(name)
        self.number(f"bytes of {name}", 8, len(pages) * PAGE)
        self.data += extra
        header = len(self.data) + self.start
        words = -(-len(pages) // 64)
        lie = -(-(header + 28 + 8 * words) // align) * align
        for label, nbytes, value in (
            ("mapped", 4, 1),
            ("size", 8, PAGE),
            ("bitmap", 8, header + 28),
            ("pages", 8, lie),
        ):
            self.number(f"{label} of {name}", nbytes, value)
        bits = sum(1 << number for number, content in enumerate(pages) if any(content))
        self.data += bits.to_bytes(8 * words, "little")
        self.data += bytes(lie - len(self.data) - self.start)
        self.data += b"".join(pages)

    def finish(self) -> bytes:
        """Sections of devices behind the RAM."""
        self.section(_FULL, "timer")
        self.data += bytes(40) + b"\0"
        return bytes(self.data)


def migrated(
    ram: Ram,
    again: Sequence[tuple[str, int, bytes]] = (),
    part: int = 7,
    left_out: Sequence[tuple[str, int]] = (),
    stream: Stream | None = None,
    machine: str = MACHINE,
    capabilities: Sequence[str] = (),
    page_size: int = PAGE,
    ended: bool = True,
) -> bytes:
    """A stream: every page once, but those left out, in parts of so many; then some again, with other bytes.

    ended: as migrations do; a background-snapshot goes on with devices at once.
    """
    stream = stream or Stream()
    stream.begin(machine, capabilities, page_size.bit_length() - 1 if page_size != PAGE else 0)
    stream.listed(ram, bytes(8) if "x-ignore-shared" in capabilities else b"", page_size)
    stream.end_section()
    records = [
        (name, number, content)
        for name, pages in ram.items()
        for number, content in enumerate(pages)
        if (name, number) not in left_out
    ]
    for at in range(0, len(records), part):
        stream.section(_PART)
        for record in records[at : at + part]:
            stream.page(*record)
        stream.end_section()
    stream.command(11)  # MIG_CMD_SWITCHOVER_START of QEMU 10
    if ended or again:
        stream.section(_END)
        for record in again:
            stream.page(*record)
        stream.end_section()
    return stream.finish()


def mapped_ram(ram: Ram, stream: Stream | None = None, align: int = PAGE, shared: Sequence[str] = ()) -> bytes:
    """A mapped-ram file's stream. align: of pages in the file, QEMU has 1 MiB; shared: blocks that are left out."""
    stream = stream or Stream()
    stream.begin("pc-q35-9.2", ["x-ignore-shared", "mapped-ram"] if shared else ["mapped-ram"])
    stream.total(ram)
    for name, pages in ram.items():
        if name in shared:
            stream.text(name)
            stream.data += struct.pack(">QQIQQQ", len(pages) * PAGE, 0, 1, PAGE, 0, 0)
        else:
            stream.mapped(name, pages, align, bytes(8) if shared else b"")
    stream.end_section()
    stream.section(_PART)
    stream.end_section()
    stream.section(_END)
    stream.end_section()
    return stream.finish()


def saved_header(
    format: int = 0, xml: bytes = XML, order: str = "<", magic: bytes = b"LibvirtQemudSave", version: int = 2
) -> bytes:
    """What is before the stream of a saved domain: its XML, a cookie, and room for a longer one."""
    cookie = b"<qemusave/>\0"
    data = xml + b"\0" + cookie + bytes(100)
    return magic + struct.pack(order + "5I", version, len(data), 1, format, len(xml) + 1) + bytes(56) + data
