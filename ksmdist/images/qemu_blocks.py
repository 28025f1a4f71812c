"""RAM blocks of a QEMU guest, and where they lie in its physical memory: a stream has their names, not addresses.

Rules: hw/i386/pc_piix.c (pc_init1) and hw/i386/pc_q35.c (pc_q35_init): RAM of a PC is split below 4 GiB;
hw/i386/microvm.c (microvm_memory_init): at 3 GiB; hw/i386/pc.c (pc_get_device_memory): DIMMs from the next GiB on;
hw/arm/virt.c, hw/riscv/virt.c: where RAM begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Part", "RamBlock", "is_device", "placed"]

_GIB = 1 << 30
_4GIB = 4 << 30
_BIOS = "pc.bios"
_DEVICE = re.compile(r"vga|vram|qxl|flash|rom$|^/rom@|tpm|sram", re.IGNORECASE)
_ALIGNED = 2 << 20  # of what is plugged in: QEMU_VMALLOC_ALIGN on x86
_NODE = re.compile(r"ram-node(\d{1,9})")
_BASES = {"mach-virt.ram": _GIB, "riscv_virt_board.ram": 2 * _GIB}
_ARM = re.compile(r"virt-\d")


class RamBlock(NamedTuple):
    """A block as its stream names it. nbytes: its used length; key: the number of its first page among all blocks'."""

    name: str
    nbytes: int
    key: int


class Part(NamedTuple):
    """Bytes [start, end) of block `block` (its place in the list), which lie at `address`."""

    block: int
    start: int
    end: int
    address: int


def is_device(name: str) -> bool:
    """Whether a block is a device's or firmware's, by its name.

    Those of devices are named by the device's path ("0000:00:02.0/vga.vram", system/memory.c and qemu_ram_set_idstr),
    memory backends by their id, or as "/objects/ID". The BIOS of a PC is not one of them: it is in a dump.
    """
    own = name.removeprefix("/objects/")
    return name != _BIOS and ("/" in own or bool(_DEVICE.search(own)))


def placed(machine: str, blocks: Sequence[RamBlock]) -> list[Part]:
    """Where the blocks that are no device's lie, in the order of their addresses, none over another.

    The machine's RAM is the largest that is named as its type has it (pc.ram, mach-virt.ram), or all that libvirt
    names ram-nodeN one after the other, or the largest. Others (DIMMs) follow from the next free GiB on, in the order
    of the stream, which has the larger ones first: not always that in which they were plugged in.
    """
    own = [number for number, block in enumerate(blocks) if block.nbytes and not is_device(block.name)]
    bios = next((number for number in own if blocks[number].name == _BIOS), None)
    memory = [number for number in own if number != bios]
    main = _main(blocks, memory)
    parts: list[Part] = []
    total = sum(blocks[number].nbytes for number in main)
    base, below = _low(machine, blocks[main[0]].name if main else "", total)
    at = 0  # in the machine's RAM, whatever blocks it is made of
    for number in main:
        nbytes = blocks[number].nbytes
        low = min(nbytes, max(0, below - at))
        if low:
            parts.append(Part(number, 0, low, base + at))
        if low < nbytes:
            parts.append(Part(number, low, nbytes, _4GIB + at + low - below))
        at += nbytes
    if bios is not None:
        nbytes = blocks[bios].nbytes
        part = Part(bios, 0, nbytes, _4GIB - nbytes)
        if nbytes <= _4GIB and all(_apart(part, other) for other in parts):
            parts.append(part)
        else:
            memory.append(bios)
    end = max((part.address + part.end - part.start for part in parts), default=0)
    at = -(-end // _GIB) * _GIB
    for number in memory:
        if number not in main:
            parts.append(Part(number, 0, blocks[number].nbytes, at))
            at += -(-blocks[number].nbytes // _ALIGNED) * _ALIGNED
    return sorted(parts, key=lambda part: part.address)


def _main(blocks: Sequence[RamBlock], memory: Sequence[int]) -> list[int]:
    """The blocks that the machine's RAM is made of, in the order of addresses."""
    typed = [number for number in memory if blocks[number].name.endswith(".ram")]
    nodes = {number: _NODE.fullmatch(blocks[number].name.removeprefix("/objects/")) for number in memory}
    numbers = sorted((int(node.group(1)), number) for number, node in nodes.items() if node)
    if numbers and not typed:
        return [number for _, number in numbers]
    return [max(typed or memory, key=lambda number: (blocks[number].nbytes, -number))] if memory else []


def _low(machine: str, name: str, nbytes: int) -> tuple[int, int]:
    """Where a machine's RAM begins, and how many bytes of it lie there: the rest is at 4 GiB."""
    if machine.startswith(("pc-q35", "q35")):
        return 0, 0x80000000 if nbytes >= 0xB0000000 else nbytes
    if machine == "pc" or machine.startswith(("pc-i440fx", "pc-0.", "pc-1.", "isapc")):
        split = 0xE0000000 if re.match(r"pc-(i440fx-)?[01]\.", machine) else 0xC0000000  # gigabyte_align: 2.0
        return 0, split if nbytes >= 0xE0000000 else nbytes
    if machine == "microvm":
        return 0, min(nbytes, 0xC0000000)
    if _ARM.match(machine) and "m68k" not in name:
        return _GIB, nbytes
    return _BASES.get(name, 0), nbytes


def _apart(one: Part, other: Part) -> bool:
    return one.address + one.end <= other.address or other.address + other.end - other.start <= one.address
