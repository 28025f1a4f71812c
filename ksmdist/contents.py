"""What the most-merged contents are: zero, a known fill word, an ELF header, text, code, and so on.

A guess for all but the first two, from one page alone; the rules are in docs/design.md, what a content is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow, strings
from ksmdist.tables import CONTENTS, KINDS, WHATS
from ksmdist.tree import Top

__all__ = ["Seen", "contents_table", "entropy_classes", "look"]

_ZERO, _FILL_WORD, _ELF, _PAGE_TABLE, _TEXT, _CODE, _LOW, _HIGH, _DATA = range(len(WHATS))

_BYTES = {
    0xFF: "all ones",
    0x6B: "SLUB poison, freed (POISON_FREE, include/linux/poison.h)",
    0x5A: "SLUB poison, not yet used (POISON_INUSE, include/linux/poison.h); jemalloc's, freed",
    0xA5: "SLUB poison's end (POISON_END, include/linux/poison.h); jemalloc's, not yet used",
    0xAA: "page poison, freed (PAGE_POISON, include/linux/poison.h)",
    0xBB: "SLUB red zone, inactive (SLUB_RED_INACTIVE, include/linux/poison.h)",
    0xCC: "MSVC uninitialised stack; SLUB red zone, active; freed init memory (include/linux/poison.h); int3",
    0xCD: "MSVC uninitialised heap",
    0xDD: "MSVC freed heap",
    0xFD: "MSVC guard bytes of the heap",
    0xAB: "Windows HeapAlloc guard bytes",
    0x20: "spaces",
    0x90: "x86 nop",
}
_WORDS = {
    0xFEEEFEEE: "Windows HeapFree",
    0xBAADF00D: "Windows LocalAlloc, uninitialised",
    0xDEADBEEF: "0xdeadbeef",
    0xCAFEBABE: "0xcafebabe",
    0x07200720: "VGA text screen, blank",
}
_LOW_BITS, _HIGH_BITS = 4.0, 7.2  # of entropy a byte
_ELF_TYPES = {1: "relocatable", 2: "executable", 3: "shared object", 4: "core"}
_ELF_MACHINES = {3: "x86", 8: "MIPS", 20: "PowerPC", 21: "PowerPC 64", 22: "s390", 40: "ARM", 62: "x86-64"}
_ELF_MACHINES |= {183: "AArch64", 243: "RISC-V", 258: "LoongArch"}

# Bytes that are 24 % and more of x86-64 machine code and less of other data: REX prefixes, mov, call, lea, test, jcc.
_X86 = np.isin(np.arange(256), [0x48, 0x4C, 0x89, 0x8B, 0x8D, 0xE8, 0x0F, 0x41, 0x44, 0x85, 0xC3, 0x83, 0x24, 0xFF])
# Last bytes of AArch64 instructions: ldr/str, add/sub, mov, bl/b, branches, adrp, ret, ldp/stp.
_AARCH64 = np.isin(
    np.arange(256),
    list(bytes.fromhex("f991d1aa2a94975 4b4b53435 90b0d0f0 d6a9 b939 52d21714 eb6bf171 3637 d5f8a8".replace(" ", ""))),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one content's first page shows. what: index of WHATS; meaning, region: "" for none."""

    what: int
    meaning: str
    region: str


def fill_meaning(word: int) -> str:
    """What is known of a page filled with this 64-bit word; "" for nothing."""
    if word == (word & 0xFF) * 0x0101010101010101:
        return _BYTES.get(word & 0xFF, "")
    return _WORDS.get(word & 0xFFFFFFFF, "") if word >> 32 == word & 0xFFFFFFFF else ""


def look(pages: np.ndarray) -> list[tuple[int, str]]:
    """Pages, uint8[n, page_size] -> for each, index of WHATS and what is known of it, "" for no more."""
    n, size = pages.shape
    words = pages.view("<u8")
    same = (words == words[:, :1]).all(axis=1)
    histogram = _histogram(pages)
    share, entropy = histogram / size, _entropy(histogram)
    printable = histogram[:, 32:127].sum(axis=1) + histogram[:, 9:14].sum(axis=1)
    filled = size - histogram[:, 0]
    text = (filled >= 64) & (printable >= 0.95 * filled)
    x86 = share[:, _X86].sum(axis=1)
    last = np.stack([np.bincount(row, minlength=256) for row in pages[:, 3::4]])
    aarch64 = last[:, _AARCH64].sum(axis=1) / (size // 4)
    code = (entropy > _LOW_BITS) & (entropy < _HIGH_BITS) & ((x86 >= 0.24) | (aarch64 >= 0.7))
    tables = _page_tables(words)
    found = []
    for row in range(n):
        if same[row]:
            found.append(_filled(int(words[row, 0])))
        elif pages[row, :4].tobytes() == b"\x7fELF":
            found.append((_ELF, _elf(pages[row, :20].tobytes())))
        elif tables[row]:
            found.append((_PAGE_TABLE, "page table entries, by their shape"))
        elif text[row]:
            found.append((_TEXT, ""))
        elif code[row]:
            found.append((_CODE, "x86-64" if x86[row] >= 0.24 else "AArch64"))
        elif entropy[row] < _LOW_BITS:
            found.append((_LOW, f"{entropy[row]:.1f} bits a byte, {filled[row]} bytes not zero"))
        elif entropy[row] >= _HIGH_BITS:
            found.append((_HIGH, f"{entropy[row]:.1f} bits a byte: compressed, encrypted or random"))
        else:
            found.append((_DATA, f"{entropy[row]:.1f} bits a byte"))
    return found


def entropy_classes(pages: np.ndarray) -> np.ndarray:
    """Pages, uint8[n, page_size] -> int8[n]: 0 below 4 bits of entropy a byte, 2 from 7.2 on, 1 between.

    Of the bytes' frequencies alone, as low_entropy and high_entropy of WHATS; what order they are in does not count.
    """
    if len(pages) == 0:
        return np.zeros(0, np.int8)
    classes: np.ndarray = np.digitize(_entropy(_histogram(pages)), (_LOW_BITS, _HIGH_BITS)).astype(np.int8)
    return classes


def _histogram(pages: np.ndarray) -> np.ndarray:
    """int64[n, 256]: how often each byte is in each page."""
    # A row at a time: 256 counters stay in the cache, where one count of all rows takes three times as long.
    return np.stack([np.bincount(row, minlength=256) for row in pages])


def _entropy(histogram: np.ndarray) -> np.ndarray:
    """float64[n]: bits a byte."""
    share = histogram / histogram.sum(axis=1, keepdims=True)
    entropy: np.ndarray = -(share * np.log2(share, out=np.zeros_like(share), where=histogram > 0)).sum(axis=1)
    return entropy


def _elf(head: bytes) -> str:
    order = "little" if head[5] == 1 else "big"
    kind, machine = (int.from_bytes(head[at : at + 2], order) for at in (16, 18))  # type: ignore[arg-type]
    return f"ELF header, {_ELF_MACHINES.get(machine, f'machine {machine}')} {_ELF_TYPES.get(kind, f'type {kind}')}"


def _page_tables(words: np.ndarray) -> np.ndarray:
    """bool[n]: pages that look like page tables of x86-64 or AArch64.

    Eight entries or more; each is 0 or has its lowest bit (present, valid) and names a frame below 2^46 bytes; few
    kinds of attributes (the low 12 bits, and from bit 50 on: AArch64 has DBM and GP there); no frame twice.
    """
    used = words != 0
    valid = ((words & np.uint64(1)) == 1) & ((words & np.uint64(0x0003C00000000000)) == 0)
    likely = np.flatnonzero((used.sum(axis=1) >= 8) & (valid | ~used).all(axis=1))
    found = np.zeros(len(words), bool)
    for row in likely.tolist():
        entries = words[row][used[row]]
        frames = entries & np.uint64(0x00003FFFFFFFF000)
        attributes = np.unique(entries & np.uint64(0xFFFC000000000FFF))
        found[row] = len(attributes) <= 8 and bool((frames != 0).all()) and len(np.unique(frames)) == len(frames)
    return found


def _filled(word: int) -> tuple[int, str]:
    return (_FILL_WORD, fill_meaning(word)) if word else (_ZERO, "the zero page")


def _by_word(top: Top, row: int) -> Seen | None:
    """What a content is whose page was not read again: known all the same, if one word fills it."""
    return Seen(*_filled(int(top.word[row])), "") if top.filled[row] else None


def contents_table(top: Top, seen: Mapping[int, Seen], image_ids: Sequence[str]) -> pa.Table:
    """The `contents` table. seen: by row of `top`, of those whose page was read again."""
    rows = range(len(top.copies))
    shown = [seen.get(row) or _by_word(top, row) for row in rows]
    columns = [
        arrow(np.arange(1, len(rows) + 1, dtype=np.int32)),
        arrow(np.ascontiguousarray(top.digest)),
        strings(KINDS, top.kind),
        arrow(top.word, null=~top.filled),
        pa.array([one and WHATS[one.what] for one in shown], pa.string()),
        pa.array([(one and one.meaning) or None for one in shown], pa.string()),
        *(arrow(column) for column in (top.copies, top.images, top.tenants, top.nodes)),
        strings(image_ids, top.image),
        arrow(top.address),
        pa.array([(one and one.region) or None for one in shown], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=CONTENTS.schema)
