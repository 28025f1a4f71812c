"""Names that are handed on in place of real ones, and random orders. Values in, values out: the seed is given.

A name's number says nothing of it: numbers are drawn, not counted in the order of names or of scanning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import shake_256

import numpy as np

from ksmdist.tables.published import REGION_CLASSES

__all__ = ["NAMED", "SEED_BYTES", "Pseudonyms", "numbered", "random_order", "region_class"]

NAMED: tuple[str, ...] = ("images", "hosts", "tenants")
"""What has names that are replaced."""

SEED_BYTES = 32

_ANONYMOUS, _HEAP, _STACK, _FILE, _SHARED, _KERNEL, _RAM, _OTHER = REGION_CLASSES
_BY_KERNEL = {"vdso", "vvar", "vvar_vclock", "vsyscall", "vectors", "sigpage", "uprobes", "aio"}


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Numbers of names, for each of NAMED; keep: those of NAMED whose names are shown as they are."""

    numbers: Mapping[str, Mapping[str, int]]
    keep: frozenset[str]

    def shown(self, named: str, name: str) -> str:
        """What stands for a name; "" is no name and stays. Raises KeyError for a name without a number."""
        if not name or named in self.keep:
            return name
        return f"{named.removesuffix('s')}-{self.numbers[named][name]}"


def random_order(seed: bytes, what: str, n: int) -> np.ndarray:
    """intp[n]: the numbers 0 to n - 1 in an order that cannot be told from a random one without the seed.

    seed: SEED_BYTES. By sorting words of SHAKE-256 (FIPS 202), so that part of an order tells nothing of the rest, as
    it would with a generator whose state can be solved for. Takes 16 bytes for each.
    """
    assert len(seed) == SEED_BYTES
    words = np.frombuffer(shake_256(seed + what.encode()).digest(8 * n), "<u8")
    return np.argsort(words, kind="stable")


def numbered(names: Iterable[str], known: Mapping[str, int], seed: bytes, what: str) -> dict[str, int]:
    """Numbers from 1 for names: the known ones have theirs, the others get the next ones, in random order."""
    new = sorted(set(names) - known.keys() - {""})
    first = max(known.values(), default=0) + 1
    return dict(known) | {new[at]: first + n for n, at in enumerate(random_order(seed, what, len(new)).tolist())}


def region_class(name: str) -> str:
    """The class, one of REGION_CLASSES, of a region of a process's address space, by its name.

    Names: /proc/PID/maps (man 5 proc; fs/proc/task_mmu.c, get_vma_name), and what CRIU has in their place. A path
    decides before its own text: a file may be called [heap].
    """
    if name.startswith(("/memfd:", "/dev/shm/", "/SYSV", "/dev/zero", "[anon_shmem:")):
        return _SHARED
    if name.startswith("/[aio]"):
        return _KERNEL
    if name.startswith("/"):
        return _FILE
    if name in ("", "[anon]") or name.startswith("[anon:"):
        return _ANONYMOUS
    if name == "[heap]":
        return _HEAP
    if name == "[stack]" or name.startswith("[stack:"):
        return _STACK
    return _KERNEL if name.startswith("[") and name[1:-1] in _BY_KERNEL else _OTHER
