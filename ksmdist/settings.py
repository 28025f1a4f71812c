"""Settings of a run: one frozen value, checked when made, written into every run.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from ksmdist.errors import SettingsError

__all__ = ["KERNELS", "LEAST_TASK_MEMORY", "PAGE_SIZES", "VERIFY", "Eligible", "Kernel", "Settings", "Verify"]

Eligible = Literal["flagged", "all"]
Kernel = Literal["6.1", "6.6", "6.12", "6.18"]
Verify = Literal["none", "hash", "bytes"]

KERNELS: tuple[Kernel, ...] = ("6.1", "6.6", "6.12", "6.18")
"""Kernels whose rules are known, oldest first: docs/ksm.md has the differences."""

VERIFY: tuple[Verify, ...] = ("none", "hash", "bytes")

PAGE_SIZES = tuple(1 << shift for shift in range(12, 19))
"""Page sizes Linux is built with: 4 KiB to 256 KiB, in bytes (arch/*/Kconfig, PAGE_SIZE_*)."""


LEAST_TASK_MEMORY = 256 << 20
"""Bytes: reading a batch of pages alone takes half of it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a run depends on besides its images; the defaults are the kernel's (mm/ksm.c).

    page_size:            bytes, one of PAGE_SIZES
    use_zero_pages:       map pages full of zeros to the shared zero page
    max_page_sharing:     most mappings of one stable node, 2 or more; None: unlimited
    merge_across_nodes:   False: merge only pages whose frames are on the same NUMA node
    eligible:             `flagged`: the pages an image marks as eligible (raw images and ELF
                          cores mark all of theirs); `all`: every page KSM could take if its
                          whole process were marked
    kernel:               the Linux whose rules and counters are followed, one of KERNELS
    full_scans:           counters after so many full scans from the start; None: once nothing
                          changes any more, with no scan skipped
    smart_scan:           with full_scans: skip pages that found no partner for a while (6.7)
    pages_to_scan, sleep_millisecs: the kernel's, for the estimate of time to converge alone
    zero_page_colors:     zero pages, chosen by address, as s390 has them; a power of two
    format:               force this image format for all images; None detects by magic
    shard_pages:          pages in a shard; None lets the size of the input decide
    ranges:               digest ranges, a power of two; None lets the size of the input decide
    task_memory:          bytes one task may take, 256 MiB or more; None lets the machines decide. A range
                          that would take more is split
    contents:             most rows of table contents, 0 or more
    checksums:            keep each page's checksum, so that a later run can say what changed
    verify:               how equal digests are confirmed to be equal pages: `none`; `hash`: by another hash, of a page
                          of each shard that has the content; `bytes`: as the kernel does, by the pages themselves
    fan_in:               most files of scan results that a merge reads; where there are more, they are
                          combined first. 2 or more

    Raises SettingsError for a value out of its range.
    """

    page_size: int = 4096
    use_zero_pages: bool = False
    max_page_sharing: int | None = 256
    merge_across_nodes: bool = True
    eligible: Eligible = "flagged"
    kernel: Kernel = "6.18"
    full_scans: int | None = None
    smart_scan: bool = False
    pages_to_scan: int = 100
    sleep_millisecs: int = 20
    zero_page_colors: int = 1
    format: str | None = None
    shard_pages: int | None = None
    ranges: int | None = None
    task_memory: int | None = None
    fan_in: int = 1024
    contents: int = 500
    checksums: bool = False
    verify: Verify = "hash"

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            allowed = ", ".join(map(str, PAGE_SIZES))
            raise SettingsError(f"{self.page_size} is no page size of Linux", "page_size", f"use one of {allowed}")
        if self.max_page_sharing is not None and self.max_page_sharing < 2:
            raise SettingsError(
                f"{self.max_page_sharing} is less than the kernel takes", "max_page_sharing", "use 2 or more"
            )
        if self.kernel not in KERNELS:
            raise SettingsError(f"{self.kernel!r} is unknown", "kernel", f"use one of {', '.join(KERNELS)}")
        if self.full_scans is not None and self.full_scans < 1:
            raise SettingsError(f"{self.full_scans} is no number of scans", "full_scans", "use 1 or more")
        if self.smart_scan and self.full_scans is None:
            raise SettingsError("never comes to rest: its counters depend on the scan", "smart_scan", "give full_scans")
        if self.smart_scan and self.kernel in ("6.1", "6.6"):
            raise SettingsError(f"is not in Linux {self.kernel}", "smart_scan", "it came with Linux 6.7")
        for name in ("pages_to_scan", "sleep_millisecs"):
            if not 0 <= getattr(self, name) < 1 << 32:
                raise SettingsError(f"{getattr(self, name)} is not an unsigned int", name, "use 0 to 4294967295")
        if not (1 <= self.zero_page_colors <= 256 and self.zero_page_colors.bit_count() == 1):
            raise SettingsError(
                f"{self.zero_page_colors} is no power of two up to 256",
                "zero_page_colors",
                "use 1, 2, 4, 8 and so on",
            )
        if self.eligible not in ("flagged", "all"):
            raise SettingsError(f"{self.eligible!r} is unknown", "eligible", "use flagged or all")
        if self.shard_pages is not None and self.shard_pages < 1:
            raise SettingsError(f"{self.shard_pages} is not a size", "shard_pages", "use 1 or more")
        if self.ranges is not None and not (1 <= self.ranges <= 1 << 16 and self.ranges.bit_count() == 1):
            raise SettingsError(f"{self.ranges} is no power of two up to 65536", "ranges", "use 1, 2, 4, 8 and so on")
        if self.task_memory is not None and self.task_memory < LEAST_TASK_MEMORY:
            raise SettingsError(
                f"{self.task_memory >> 20} MiB are too few for a task", "task_memory", "use 256 MiB or more"
            )
        if not 0 <= self.contents <= 1 << 20:
            raise SettingsError(f"{self.contents} is no number of contents", "contents", "use 0 to 1048576")
        if self.verify not in VERIFY:
            raise SettingsError(f"{self.verify!r} is unknown", "verify", f"use {', '.join(VERIFY)}")
        if self.fan_in < 2:
            raise SettingsError(f"{self.fan_in} is no number of files to combine", "fan_in", "use 2 or more")

    def as_dict(self) -> dict[str, object]:
        """The settings by name, as run.json and `--json` print them."""
        return asdict(self)
